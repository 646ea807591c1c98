"""Dense layers: q, k and v, and o, each implementation checked, then all timed in turns.

On a route that was made before, as one is for all layers of a step: by ``route`` here, by vLLM's preparation
of its metadata there.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import torch

from . import measure
from .cases import DenseCase
from .data import BARE_TOKENS, DTYPES, Matrices, adapters_of, rotation_of
from .dense_peer import DensePeer, Pair
from .floors import Ceilings, dense_floor
from .operator_runs import all_checked, attempt, check_adding, line_of, time_graphs
from .ours import table_of
from .records import Sink


@dataclass
class Weights:
    """Sets of stacked weights, as the layers of a model have them."""

    #: For each set and slice: [adapters, 1, rank, in_dim].
    a: list[Matrices]
    #: For each set and slice: [adapters, 1, width of the slice, rank].
    b: list[Matrices]

    @staticmethod
    def draw(case: DenseCase, sets: int) -> Weights:
        """Normal values, scaled so that h and the delta are about 1."""

        def stack(rows: int, columns: int) -> torch.Tensor:
            shape = (case.adapters, 1, rows, columns)
            return torch.randn(shape, device="cuda", dtype=DTYPES[case.dtype]).mul_(columns**-0.5)

        return Weights(
            a=[[stack(case.rank, case.in_dim) for _ in case.out_dims] for _ in range(sets)],
            b=[[stack(n, case.rank) for n in case.out_dims] for _ in range(sets)],
        )


class Layer:
    """A dense layer's operands, and what must come out of them."""

    def __init__(self, case: DenseCase, weights: Weights) -> None:
        self.case, self.weights = case, weights
        dtype = DTYPES[case.dtype]
        self.token_lora = adapters_of(case.tokens, case.adapters)
        self.x = torch.randn(case.tokens, case.in_dim, device="cuda", dtype=dtype)
        self.out = torch.zeros(case.tokens, case.width, device="cuda", dtype=dtype)

    def reference(self, chosen: int) -> torch.Tensor:
        """The delta in float32, [tokens, width], with one set of weights."""
        delta = torch.zeros_like(self.out, dtype=torch.float32)
        for adapter in range(self.case.adapters):
            tokens = torch.nonzero(self.token_lora == adapter).reshape(-1)
            parts = [
                self.x[tokens].float() @ a[adapter, 0].float().T @ b[adapter, 0].float().T
                for a, b in zip(self.weights.a[chosen], self.weights.b[chosen], strict=True)
            ]
            delta[tokens] = torch.cat(parts, dim=1)
        return delta


class Dense(Protocol):
    """What is asked of an implementation."""

    def route(self) -> None:
        """What is done once for all layers of a step."""

    def forward(self, chosen: int) -> None:
        """Both products with one set of weights, added to ``out``."""


class OursDense:
    """This project, on stacked weights or on tables that name them."""

    def __init__(self, layer: Layer, on_tables: bool) -> None:
        # Here, since a package that cannot be imported is reported as failed, and its peer is measured.
        import moe_lora

        case = layer.case
        self.layer = layer
        self.library: Any = moe_lora
        self.workspace = moe_lora.Workspace(
            case.tokens,
            top_k=1,
            slices=len(case.out_dims),
            experts=1,
            slots=case.adapters,
            max_rank=case.rank,
        )
        pairs = zip(layer.weights.a, layer.weights.b, strict=True)
        self.weights: list[dict[str, Any]]
        if on_tables:
            sizes: dict[str, Any] = {"out_dims": list(case.out_dims), "in_dim": case.in_dim}
            sizes |= {"max_rank": case.rank, "rank": case.rank}
            self.weights = [{"table": table_of(a, b, **sizes)} for a, b in pairs]
        else:
            self.weights = [{"a": a, "b": b} for a, b in pairs]

    def route(self) -> None:
        """Kept in the workspace: made by a call of these sizes, as that of the first layer is."""
        layer = self.layer
        tensors = {"token_lora": layer.token_lora, "out": torch.empty_like(layer.out)}
        self.library.forward(layer.x, **self.weights[0], **tensors, workspace=self.workspace)

    def forward(self, chosen: int) -> None:
        """On the route that the workspace keeps."""
        layer = self.layer
        self.library.forward(layer.x, **self.weights[chosen], out=layer.out, workspace=self.workspace)


class VllmDense:
    """vLLM's pair."""

    def __init__(self, layer: Layer, pair: Pair) -> None:
        self.layer, self.peer = layer, DensePeer(pair, layer.token_lora, layer.case.adapters)

    def route(self) -> None:
        """Its metadata."""
        self.peer.route()

    def forward(self, chosen: int) -> None:
        """One shrink, one expand."""
        layer = self.layer
        self.peer.forward(layer.x, layer.weights.a[chosen], layer.weights.b[chosen], layer.out)


class Shelf:
    """Weights, kept from one case to the next as long as their shapes are the same."""

    def __init__(self, pair: Pair | None) -> None:
        self.pair = pair
        self.key: object = None
        self.weights: Weights | None = None

    def take(self, case: DenseCase, sets: int) -> Weights:
        """At least so many sets."""
        key = (case.in_dim, case.out_dims, case.rank, case.adapters, case.dtype)
        if self.weights is None or self.key != key or len(self.weights.a) < sets:
            self.weights = None
            torch.cuda.empty_cache()
            if self.pair is not None:
                self.pair.forget()
            self.key, self.weights = key, Weights.draw(case, sets)
        return self.weights


def load(peers: Path) -> tuple[Pair | None, str | None]:
    """vLLM's pair, or why there is none."""
    return attempt(partial(Pair.load, peers))


def run_case(sink: Sink, shelf: Shelf, missing: str | None, case: DenseCase, ceilings: Ceilings) -> None:
    """One call, of this project on stacked weights and on tables, and of vLLM's pair."""
    used = int(torch.unique(adapters_of(case.tokens, case.adapters)).numel())
    sets = rotation_of(used * case.matrices * 2, case.adapters * case.matrices * 2)
    layer = Layer(case, shelf.take(case, sets))
    makers: dict[str, Callable[[], Dense]] = {
        "ours": partial(OursDense, layer, on_tables=False),
        "table": partial(OursDense, layer, on_tables=True),
    }
    if shelf.pair is not None:
        makers["vllm033"] = partial(VllmDense, layer, shelf.pair)

    # Checked with tokens that have no adapter, of which the timed batch has none.
    adapters = layer.token_lora.clone()
    layer.token_lora[BARE_TOKENS - 1 :: BARE_TOKENS] = -1
    reference, bare = layer.reference(0), layer.token_lora < 0

    def checked(make: Callable[[], Dense]) -> tuple[Dense, float]:
        made = make()

        def call() -> None:
            made.route()
            made.forward(0)

        return made, check_adding(call, layer.out, bare, case.dtype, reference)

    ready, results = all_checked({label: partial(checked, make) for label, make in makers.items()})
    if missing is not None:
        results["vllm033"] = {"failed": missing}

    layer.token_lora.copy_(adapters)
    layer.out.zero_()
    for made in ready.values():
        made.route()
    least = dense_floor(case, used)
    floor_us = least.microseconds(ceilings)
    calls = measure.calls_of(floor_us)
    time_graphs(
        results,
        "us",
        {label: partial(measure.rotation, made.forward, sets, calls) for label, made in ready.items()},
    )
    sink.write(
        "dense",
        f"dense {case.describe()}: floor {floor_us:.1f}, {line_of(results)}",
        case=case.to_json(),
        adapters_used=used,
        sets=sets,
        bytes=least.bytes,
        operations=least.operations,
        floor_us=floor_us,
        results=results,
    )
