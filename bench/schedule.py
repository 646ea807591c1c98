"""The steps of a serving run: continuous batching with prefill in chunks.

The schedule is vLLM's: a step takes one token from every request that is generating and continues
prompts that have begun, in the order in which requests came in, then begins waiting prompts, until
it holds ``step_tokens`` tokens. The last chunk of a prompt yields the request's first token. Clients
keep ``concurrency`` requests in flight: whenever one ends, the next is there at the following step.
So the steps do not depend on how long they take, and every implementation is given the same ones.

Needs neither torch nor a GPU.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple


@dataclass(frozen=True)
class Workload:
    """A serving run; the defaults are those of vLLM's pull request 32770."""

    requests: int = 800
    prompt: int = 1024
    output: int = 100
    concurrency: int = 80
    step_tokens: int = 8192
    adapters: int = 2


class Chunk(NamedTuple):
    """One request's tokens in a step."""

    request: int
    tokens: int
    #: Whether the step yields a token of this request.
    yields: bool


@dataclass
class _Request:
    number: int
    prompt_left: int
    output_left: int


def steps(load: Workload) -> list[list[Chunk]]:
    """The chunks of each step, in the order in which they lie in the batch."""
    if min(load.prompt, load.output, load.concurrency, load.step_tokens) < 1:
        raise ValueError("a workload's sizes must be positive")
    in_flight: list[_Request] = []
    arrived = 0
    schedule: list[list[Chunk]] = []
    while True:
        while arrived < load.requests and len(in_flight) < load.concurrency:
            in_flight.append(_Request(arrived, load.prompt, load.output))
            arrived += 1
        if not in_flight:
            return schedule
        step, budget = [], load.step_tokens
        for request in in_flight:
            tokens = min(request.prompt_left or 1, budget)
            if tokens == 0:
                break
            budget -= tokens
            request.prompt_left = max(0, request.prompt_left - tokens)
            yields = request.prompt_left == 0
            request.output_left -= yields
            step.append(Chunk(request.number, tokens, yields))
        in_flight = [request for request in in_flight if request.output_left > 0]
        schedule.append(step)


def tokens(step: Sequence[Chunk]) -> int:
    """Tokens of a step."""
    return sum(chunk.tokens for chunk in step)


@dataclass
class Latency:
    """What requests wait for, in the unit of the steps' times."""

    #: For each request: the steps from its arrival to its first token.
    first_token: list[float] = field(default_factory=list)
    #: For each later token of each request: its step.
    later_tokens: list[float] = field(default_factory=list)


def latency(schedule: Sequence[Sequence[Chunk]], times: Sequence[float], load: Workload) -> Latency:
    """Spreads the times of steps over the requests that wait for them."""
    result = Latency()
    since = [0.0] * min(load.concurrency, load.requests)
    first = [True] * load.requests
    left = [load.output] * load.requests
    now = 0.0
    for step, time in zip(schedule, times, strict=True):
        now += time
        for chunk in step:
            if not chunk.yields:
                continue
            if first[chunk.request]:
                first[chunk.request] = False
                result.first_token.append(now - since[chunk.request])
            else:
                result.later_tokens.append(time)
            left[chunk.request] -= 1
        # Whoever ended here is followed by the next request, which arrives now.
        ended = sum(1 for chunk in step if chunk.yields and left[chunk.request] == 0)
        since.extend([now] * min(ended, load.requests - len(since)))
    return result


def percentile(values: Sequence[float], share: float) -> float:
    """The smallest value that at least this share of all values do not exceed."""
    return sorted(values)[max(0, math.ceil(share * len(values)) - 1)]


def summary(
    schedule: Sequence[Sequence[Chunk]], milliseconds: Sequence[float], load: Workload
) -> dict[str, float]:
    """What requests wait for, of the times of the steps."""
    waits = latency(schedule, milliseconds, load)
    return {
        "token_ms_mean": statistics.fmean(waits.later_tokens),
        "token_ms_p99": percentile(waits.later_tokens, 0.99),
        "first_ms_mean": statistics.fmean(waits.first_token),
        "first_ms_p99": percentile(waits.first_token, 0.99),
        "total_s": sum(milliseconds) / 1e3,
    }
