"""The MoE-LoRA work of a serving run, step by step, through each implementation.

This is the operator's share of a serving run, not a server: no attention, no base model, no sampling, no
scheduler runs here. The steps are those of :mod:`bench.schedule`, and every one of them is run, none is
multiplied: all layers, each with weights of its own, each with its own random choice of experts drawn anew
for every step, each implementation with its own routing step (once a layer, for w13 and w2), on the same
choices. As in an engine, a step is one CUDA graph, captured for its number of tokens; graphs are timed on
the device, one implementation after the other within each step.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from functools import partial
from typing import Any

import torch

from . import measure, schedule
from .cases import QWEN3, Case
from .data import Projection, Routing, Weights
from .implementation import Implementation
from .operator_runs import implementations
from .peers import Vllm
from .records import NAMES, OURS, Sink
from .schedule import Chunk, Workload

LAYERS = 48
RANK = 64
#: Layers whose times decide which block size a tuned configuration takes.
TUNING_LAYERS = 4
#: Distance from float32 that passes, of what all layers together added to one output.
TOLERANCE = 1.5e-2
#: The step whose result is checked against the float32 reference; the others are checked against each other.
REFERENCE_TOKENS = 80


def workload(quick: bool) -> Workload:
    """The serving run that is replayed."""
    return Workload(requests=160) if quick else Workload()


def cases(quick: bool) -> list[Case]:
    """Every call of the replay."""
    load = workload(quick)
    sizes = {schedule.tokens(step) for step in schedule.steps(load)}
    return [Case(QWEN3, op, size, RANK, load.adapters) for size in sorted(sizes) for op in ("w13", "w2")]


def run(sink: Sink, vllm: Vllm, quick: bool) -> None:
    """Runs the whole schedule and writes one record."""
    load = workload(quick)
    steps = schedule.steps(load)
    sizes = sorted({schedule.tokens(step) for step in steps}, reverse=True)
    batch = Batch(sizes[0], load.adapters)
    graphs: dict[int, dict[str, measure.Recording]] = {}
    tuned: dict[int, str] = {}
    failures: dict[str, str] = {}
    for size in sizes:
        graphs[size] = batch.record(vllm, size, tuned, failures)
    sink.say(f"captured steps of {len(sizes)} sizes")
    names = [name for name in NAMES if name not in failures]
    for size in (sizes[0], REFERENCE_TOKENS):
        failures |= batch.check(next(s for s in steps if schedule.tokens(s) == size), graphs[size])
    names = [name for name in names if name not in failures]
    sink.say("checked the results of two steps")

    times: dict[str, list[float]] = {name: [] for name in names}
    for number, step in enumerate(steps):
        batch.draw(step, seed=number)
        recordings = graphs[schedule.tokens(step)]
        for name, took in measure.one_round({name: recordings[name] for name in names}, number).items():
            times[name].append(took)
    results: dict[str, Any] = {name: {"failed": why} for name, why in failures.items()}
    for name in names:
        results[name] = schedule.summary(steps, times[name], load)
    line = ", ".join(
        f"{name} " + (why["failed"] if "failed" in why else f"{why['total_s']:.2f} s")
        for name, why in results.items()
    )
    sink.write(
        "replay",
        f"replay of {len(steps)} steps: {line}",
        workload=asdict(load),
        model=QWEN3.name,
        layers=LAYERS,
        rank=RANK,
        steps=len(steps),
        tuned={str(size): of for size, of in tuned.items()},
        results=results,
    )


class Batch:
    """All layers' weights, and the buffers of the largest step, which smaller steps use the beginning of."""

    def __init__(self, most_tokens: int, adapters: int) -> None:
        self.adapters = adapters
        self.cases = {op: Case(QWEN3, op, most_tokens, RANK, adapters) for op in ("w13", "w2")}
        self.weights = {op: Weights.draw(case, LAYERS) for op, case in self.cases.items()}
        #: One layer after the other: the router's choices of a step, [layers, tokens, top_k].
        shape = (LAYERS * most_tokens * QWEN3.top_k,)
        self.topk_ids = torch.empty(shape, dtype=torch.int32, device="cuda")
        self.topk_weights = torch.empty(shape, dtype=torch.float32, device="cuda")
        self.token_lora = torch.empty(most_tokens, dtype=torch.int32, device="cuda")
        whole = Routing.over(self.cases["w13"], *self._views(most_tokens)[0], self.token_lora)
        self.whole = {op: Projection(case, whole, self.weights[op]) for op, case in self.cases.items()}

    def _views(self, size: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """The router's choices of each layer in a step of so many tokens."""
        count = LAYERS * size * QWEN3.top_k
        shape = (LAYERS, size, QWEN3.top_k)
        ids, weights = self.topk_ids[:count].view(shape), self.topk_weights[:count].view(shape)
        return list(zip(ids, weights, strict=True))

    def _layers(self, size: int) -> list[tuple[Routing, Projection, Projection]]:
        """Each layer's routing and projections in a step of so many tokens."""
        layers = []
        for ids, weights in self._views(size):
            case = Case(QWEN3, "w13", size, RANK, self.adapters)
            routing = Routing.over(case, ids, weights, self.token_lora[:size])
            up, down = (self.whole[op].part(size, routing) for op in ("w13", "w2"))
            layers.append((routing, up, down))
        return layers

    def draw(self, step: Sequence[Chunk], seed: int) -> None:
        """The router's choices in every layer, and the requests' adapters, for a step."""
        size = schedule.tokens(step)
        random = torch.Generator("cuda").manual_seed(seed)
        for ids, weights in self._views(size):
            scores = torch.rand(size, QWEN3.experts, generator=random, device="cuda")
            values, chosen = scores.topk(QWEN3.top_k)
            ids.copy_(chosen)
            weights.copy_(values / values.sum(1, keepdim=True))
        adapters = torch.tensor([chunk.request % self.adapters for chunk in step], dtype=torch.int32)
        counts = torch.tensor([chunk.tokens for chunk in step])
        self.token_lora[:size].copy_(adapters.repeat_interleave(counts))

    def record(
        self, vllm: Vllm, size: int, tuned: dict[int, str], failures: dict[str, str]
    ) -> dict[str, measure.Recording]:
        """Each implementation's graph of a step of so many tokens; notes what "tuned" stands for."""
        self.draw([Chunk(request, 1, True) for request in range(size)], seed=size)
        layers = self._layers(size)
        made: dict[str, Implementation] = {}
        sample: dict[str, measure.Recording] = {}
        for label, make in implementations(vllm, layers[0][1].case, layers[0][0]).items():
            try:
                made[label] = make()
                made[label].prepare(*layers[0][1:])
                sample[label] = measure.Recording.of(_calls(made[label], layers[:TUNING_LAYERS]))
            except Exception as error:
                if "/" not in label:  # A block size that cannot be had is no failure.
                    failures[label] = f"{type(error).__name__}: {error}"[:300]
        fastest = measure.in_turns({label: r for label, r in sample.items() if label not in OURS}, rounds=3)
        tuned[size] = min(fastest, key=lambda label: fastest[label])
        chosen = {name: name for name in (*OURS, *vllm.operators) if name in sample}
        chosen["tuned"] = tuned[size]
        return {name: measure.Recording.of(_calls(made[of], layers)) for name, of in chosen.items()}

    def check(self, step: Sequence[Chunk], recordings: dict[str, measure.Recording]) -> dict[str, str]:
        """Which implementations' results of a step are wrong: after all layers, the sum of their deltas."""
        size = schedule.tokens(step)
        self.draw(step, seed=1)
        layers = self._layers(size)
        outputs = [projection.out for projection in layers[0][1:]]
        expected: list[torch.Tensor] = []
        if size == REFERENCE_TOKENS:
            expected = [torch.zeros_like(out, dtype=torch.float32) for out in outputs]
            for number, (_, *projections) in enumerate(layers):
                for total, projection in zip(expected, projections, strict=True):
                    total += projection.reference(number)
        wrong = {}
        for name, recording in recordings.items():
            for out in outputs:
                out.zero_()
            recording.graph.replay()
            if not expected:  # No reference: the first is the measure of the others.
                expected = [out.float() for out in outputs]
            for out, right in zip(outputs, expected, strict=True):
                error = ((out.float() - right).norm() / right.norm()).item()
                if not error <= TOLERANCE:
                    wrong[name] = f"wrong result in a step of {size} tokens: error {error:.1e}"
        return wrong


def _calls(
    implementation: Implementation, layers: Sequence[tuple[Routing, Projection, Projection]]
) -> list[measure.Call]:
    """One call a layer: routing, w13, w2."""

    def layer(number: int, routing: Routing, up: Projection, down: Projection) -> None:
        implementation.use(routing)
        implementation.routed(up, number)
        implementation.forward(down, number)

    return [partial(layer, number, *parts) for number, parts in enumerate(layers)]
