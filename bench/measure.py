"""CUDA graphs timed in turns, host time, and the machine's ceilings."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch

from .floors import Ceilings

Call = Callable[[], None]

#: Replays of each graph before the first that counts.
WARM_UP = 2
#: Rounds that count: as many as fit the time, within these bounds.
MIN_ROUNDS, MAX_ROUNDS, ROUNDS_MS = 9, 25, 250.0
#: Calls in a graph: so many that its launch is lost in them. It takes 2 to 5 µs of a graph's time, so a call
#: of a few microseconds is to stand beside a hundred others, as in an engine's graphs, and a long one beside
#: fewer.
MIN_CALLS, MAX_CALLS, GRAPH_US = 16, 128, 2000.0


@dataclass
class Recording:
    """A graph, and the calls in it, which keep alive what the graph holds addresses of."""

    graph: torch.cuda.CUDAGraph
    calls: Sequence[Call]

    @staticmethod
    def of(calls: Sequence[Call]) -> Recording:
        """Runs the calls once, so that whatever is set up at first use is, then captures them."""
        for call in calls:
            call()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for call in calls:
                call()
        return Recording(graph, calls)


def calls_of(microseconds: float) -> int:
    """Calls in a graph, where one takes at least so long."""
    return max(MIN_CALLS, min(MAX_CALLS, int(GRAPH_US / microseconds)))


def rotation(call: Callable[[int], None], sets: int, least: int) -> list[Call]:
    """At least so many calls, on one set of weights after another, each set as often as any other."""
    rounds = -(-least // sets)
    return [partial(call, chosen) for _ in range(rounds) for chosen in range(sets)]


def in_turns(recordings: Mapping[str, Recording], rounds: int | None = None) -> dict[str, float]:
    """Microseconds a call of each graph: the median over rounds in which every graph runs once.

    So whatever drifts (clocks, temperature, other users) drifts for all alike. Each round begins with
    another graph, since a graph also feels what ran before it.
    """
    names = list(recordings)
    for _ in range(WARM_UP):
        spent = sum(one_round(recordings).values())
    if rounds is None:
        rounds = max(MIN_ROUNDS, min(MAX_ROUNDS, int(ROUNDS_MS / max(spent, 1e-3))))
    times: dict[str, list[float]] = {name: [] for name in names}
    for turn in range(rounds):
        for name, took in one_round(recordings, first=turn).items():
            times[name].append(took)
    return {name: statistics.median(times[name]) * 1e3 / len(recordings[name].calls) for name in names}


def one_round(recordings: Mapping[str, Recording], first: int = 0) -> dict[str, float]:
    """Replays each graph once, beginning with the ``first``; the milliseconds of each."""
    names = list(recordings)
    begin = first % max(1, len(names))
    order = names[begin:] + names[:begin]
    marks = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in order]
    for name, (begun, ended) in zip(order, marks, strict=True):
        begun.record()
        recordings[name].graph.replay()
        ended.record()
    torch.cuda.synchronize()
    return {name: begun.elapsed_time(ended) for name, (begun, ended) in zip(order, marks, strict=True)}


def host_time(call: Callable[[int], None], sets: int, calls: int = 64, batches: int = 9) -> float:
    """Microseconds of host time a call, outside a graph.

    A batch is issued without waiting, onto an idle device, and is short enough that the driver's queue
    never fills; the median over batches.
    """
    times = []
    for _ in range(batches + 1):
        torch.cuda.synchronize()
        begun = time.perf_counter()
        for number in range(calls):
            call(number % sets)
        times.append((time.perf_counter() - begun) * 1e6 / calls)
    torch.cuda.synchronize()
    return statistics.median(times[1:])


def ceilings() -> Ceilings:
    """Bandwidth of a large copy and rate of a large bf16 product, as torch does them."""
    source = torch.randn(1 << 30, device="cuda", dtype=torch.bfloat16)
    target = torch.empty_like(source)
    matrix = torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16)
    copy = _seconds(lambda: target.copy_(source))
    product = _seconds(lambda: torch.mm(matrix, matrix))
    return Ceilings(bandwidth=2 * source.nbytes / copy, operations=2 * 8192**3 / product)


def _seconds(work: Callable[[], object], times: int = 11) -> float:
    took = []
    for _ in range(times):
        begun, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begun.record()
        work()
        ended.record()
        ended.synchronize()
        took.append(begun.elapsed_time(ended) * 1e-3)
    return float(statistics.median(took[1:]))
