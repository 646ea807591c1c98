"""Calls, layers and routing steps: each implementation checked, then all timed in turns."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, TypeVar

import torch

from . import measure
from .cases import Case
from .data import Projection, Routing, Weights, sets_needed
from .floors import Ceilings, floor
from .implementation import Implementation
from .ours import Ours, stand_in
from .peers import Vllm
from .records import OURS, Sink, show
from .vllm_defaults import tuned_blocks

Made = TypeVar("Made")
Make = Callable[[], Implementation]
Results = dict[str, dict[str, Any]]

#: Distance from float32 that passes, by type: ‖out - base - reference‖ / ‖reference‖. The operator's own
#: tolerances are 3e-3 and 6e-4; the sum with what `out` held before is rounded once more.
TOLERANCE = {"bf16": 6e-3, "f16": 1.2e-3}
#: What `out` holds before a checked call, in multiples of a normal value and of the delta's size.
BASE = 0.25
#: What is timed: on a kept route, and with routing in the call.
KEYS = ("us", "routed_us")
#: Tokens of the cases whose host time is measured too.
HOST_TOKENS = (1, 80, 1024)


class Shelf:
    """Weights, kept from one case to the next as long as their shapes are the same."""

    def __init__(self) -> None:
        self.key: object = None
        self.weights: Weights | None = None

    @staticmethod
    def order(case: Case) -> tuple[Any, ...]:
        """What the shapes of weights depend on; sorted by it, cases change them seldom."""
        return (case.model.name, case.op, case.dtype, case.rank, case.used_rank, case.adapters)

    def take(self, case: Case, sets: int) -> Weights:
        """At least so many sets."""
        if self.weights is None or self.key != self.order(case) or len(self.weights.a) < sets:
            self.clear()
            self.key, self.weights = self.order(case), Weights.draw(case, sets)
        return self.weights

    def clear(self) -> None:
        """Gives the memory back."""
        self.weights = None
        torch.cuda.empty_cache()


def implementations(vllm: Vllm, case: Case, routing: Routing) -> dict[str, Make]:
    """How to make each: ours in both forms, both releases as shipped, and each at every block size."""
    makers: dict[str, Make] = {
        "ours": partial(Ours, routing, case.rank),
        "standin": partial(stand_in, routing, case.rank),
    }
    for name in vllm.operators:
        makers[name] = partial(vllm.peer, name, routing, case.rank)
        for block in tuned_blocks(case):
            makers[f"{name}/{block}"] = partial(vllm.peer, name, routing, case.rank, block)
    return makers


def attempt(work: Callable[[], Any]) -> tuple[Any, str | None]:
    """The result, or what went wrong: who fails is reported, and the others go on."""
    try:
        return work(), None
    except Exception as error:
        return None, f"{type(error).__name__}: {error}"[:300]


def fold_tuned(results: Results) -> None:
    """Replaces all block sizes by one entry, ``tuned``: each time the fastest, those that ship included."""
    peers = {label: result for label, result in results.items() if label not in OURS}
    for label in [label for label in results if "/" in label]:
        del results[label]
    tuned: dict[str, Any] = {"of": {}, "left_out": {}}
    for label, result in peers.items():
        if "/" in label and "failed" in result:
            tuned["left_out"][label] = result["failed"]
        for key in KEYS:
            if key in result and result[key] <= tuned.get(key, result[key]):
                tuned[key], tuned["of"][key] = result[key], label
    results["tuned"] = tuned


def _distance(got: torch.Tensor, reference: torch.Tensor) -> float:
    return float((got - reference).norm() / reference.norm())


def check_adding(
    call: Callable[[], None], out: torch.Tensor, bare: torch.Tensor, dtype: str, reference: torch.Tensor
) -> float:
    """The error of a call that adds to what ``out`` holds; it must not touch the rows that are ``bare``."""
    base = torch.randn_like(out).mul_(BASE * reference.square().mean().sqrt().item())
    out.copy_(base)
    call()
    if not torch.equal(out[bare], base[bare]):
        raise AssertionError("the rows of tokens without an adapter were changed")
    error = _distance(out.float() - base.float(), reference)
    allowed = TOLERANCE[dtype]
    if not error <= allowed:
        raise AssertionError(f"wrong result: error {error:.1e}, at most {allowed:.1e} is allowed")
    return error


def check_overwriting(ours: Ours, projection: Projection, reference: torch.Tensor) -> None:
    """A call that overwrites leaves nothing of the poison that ``out`` held."""
    projection.out.fill_(float("nan"))
    ours.route()
    ours.forward(projection, 0, accumulate=False)
    error = _distance(projection.out.float(), reference)
    if not error <= TOLERANCE[projection.case.dtype]:
        raise AssertionError(f"wrong result when overwriting: error {error:.1e}")


def all_checked(makers: Mapping[str, Callable[[], tuple[Made, float]]]) -> tuple[dict[str, Made], Results]:
    """Those that could be made and checked, and for each its error, or why it failed."""
    ready: dict[str, Made] = {}
    results: Results = {}
    for label, make in makers.items():
        done, fault = attempt(make)
        if fault is None:
            ready[label], error = done
            results[label] = {"error": error}
        else:
            results[label] = {"failed": fault}
    return ready, results


def make_checked(
    makers: Mapping[str, Make], projection: Projection
) -> tuple[dict[str, Implementation], Results]:
    """Those whose result is right, and for each its error, or why it failed."""
    reference = projection.reference(0)
    bare = projection.routing.token_lora < 0

    def checked(make: Make) -> tuple[Implementation, float]:
        made = make()
        made.prepare(projection)
        if isinstance(made, Ours):
            check_overwriting(made, projection, reference)
        call = partial(made.routed, projection, 0)
        return made, check_adding(call, projection.out, bare, projection.case.dtype, reference)

    return all_checked({label: partial(checked, make) for label, make in makers.items()})


def time_graphs(results: Results, key: str, makers: Mapping[str, Callable[[], list[measure.Call]]]) -> None:
    """Captures each implementation's calls, times all in turns, and notes the times, or who failed."""
    recordings: dict[str, measure.Recording] = {}

    def record(make: Callable[[], list[measure.Call]]) -> measure.Recording:
        return measure.Recording.of(make())

    for label, make in makers.items():
        recording, fault = attempt(partial(record, make))
        if fault is None:
            recordings[label] = recording
        else:
            results[label] = {"failed": fault}
    for label, microseconds in measure.in_turns(recordings).items():
        results.setdefault(label, {})[key] = microseconds


def time_both(
    results: Results, ready: Mapping[str, Implementation], projection: Projection, sets: int, calls: int
) -> None:
    """Notes the times on a kept route, and with routing in the call, which are :data:`KEYS`."""
    kept = {label: partial(made.forward, projection) for label, made in ready.items()}
    routed = {label: partial(made.routed, projection) for label, made in ready.items()}
    for key, work in zip(KEYS, (kept, routed), strict=True):
        rotations = {label: partial(measure.rotation, call, sets, calls) for label, call in work.items()}
        time_graphs(results, key, rotations)


def run_case(sink: Sink, vllm: Vllm, shelf: Shelf, case: Case, ceilings: Ceilings) -> None:
    """One call of the operator: on a kept route, with routing, and its host time."""
    routing = Routing(case)
    routing.draw(seed=case.tokens)
    segments = routing.segments()
    sets = sets_needed(case, segments)
    projection = Projection(case, routing, shelf.take(case, sets))

    # Checked on other random choices than those that are timed, and with tokens that have no adapter.
    routing.draw(seed=case.tokens + 1, bare_tokens=True)
    ready, results = make_checked(implementations(vllm, case, routing), projection)

    routing.draw(seed=case.tokens)
    projection.out.zero_()
    for implementation in ready.values():
        # Not route(): a route is kept as the call needs it that it comes with, as w13's is for w2.
        implementation.routed(projection, 0)
    least = floor(case, segments)
    floor_us = least.microseconds(ceilings)
    time_both(results, ready, projection, sets, measure.calls_of(floor_us))
    fold_tuned(results)
    if case.tokens in HOST_TOKENS:
        for label, made in ready.items():
            if "us" in results.get(label, {}):
                results[label]["host_us"] = measure.host_time(partial(made.routed, projection), sets)

    sink.write(
        "case",
        f"{case.describe()}: floor {floor_us:.1f}, {line_of(results)}",
        case=case.to_json(),
        segments=segments,
        sets=sets,
        bytes=least.bytes,
        operations=least.operations,
        floor_us=floor_us,
        results=results,
    )


def run_layer(sink: Sink, vllm: Vllm, w13: Case, w2: Case, ceilings: Ceilings) -> None:
    """A whole layer: routing, w13 and w2, on one layer's weights after another's."""
    routing = Routing(w13)
    routing.draw(seed=w13.tokens)
    segments = routing.segments()
    floor_us = sum(floor(case, segments).microseconds(ceilings) for case in (w13, w2))
    sets = max(sets_needed(case, segments) for case in (w13, w2))
    up, down = (Projection(case, routing, Weights.draw(case, sets)) for case in (w13, w2))

    def calls(make: Make) -> list[measure.Call]:
        implementation = make()
        implementation.prepare(up, down)

        def layer(chosen: int) -> None:
            implementation.routed(up, chosen)
            implementation.forward(down, chosen)

        return measure.rotation(layer, sets, measure.calls_of(floor_us))

    results: Results = {}
    makers = implementations(vllm, w13, routing)
    time_graphs(results, "us", {label: partial(calls, make) for label, make in makers.items()})
    fold_tuned(results)
    sink.write(
        "layer",
        f"layer of {w13.tokens} tokens: floor {floor_us:.1f}, {line_of(results)}",
        cases=[w13.to_json(), w2.to_json()],
        floor_us=floor_us,
        results=results,
    )


def run_route(sink: Sink, vllm: Vllm, case: Case) -> None:
    """The routing step alone; vLLM's at the block size that it ships with for so many tokens."""
    routing = Routing(case)
    routing.draw(seed=case.tokens)

    def calls(make: Make) -> list[measure.Call]:
        return [make().route] * measure.MAX_CALLS

    results: Results = {}
    makers: dict[str, Make] = {
        "ours": partial(Ours, routing, case.rank),
        "vllm033": partial(vllm.peer, "vllm033", routing, case.rank),
    }
    time_graphs(results, "us", {label: partial(calls, make) for label, make in makers.items()})
    sink.write(
        "route", f"route of {case.pairs} pairs: {line_of(results)}", case=case.to_json(), results=results
    )


def line_of(results: Results) -> str:
    return ", ".join(f"{label} {show(result)}" for label, result in results.items())
