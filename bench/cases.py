"""Which calls are measured. Needs neither torch nor a GPU.

A file of cases (``--cases``) is a list of objects with the fields of :class:`Case`, those that have a default
being optional; the model is a name of :data:`MODELS` or its sizes::

    [{"model": "qwen3-30b-a3b", "op": "w13", "tokens": 80, "rank": 64, "adapters": 2},
     {"model": {"name": "mine", "hidden": 4096, "intermediate": 1536, "experts": 64, "top_k": 6},
      "op": "w2", "tokens": 512, "rank": 16, "adapters": 4, "dtype": "f16", "routing": "zipf"}]
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Model:
    """The sizes of a mixture-of-experts layer."""

    name: str
    hidden: int
    intermediate: int
    experts: int
    top_k: int


QWEN3 = Model("qwen3-30b-a3b", 2048, 768, 128, 8)
GPT_OSS = Model("gpt-oss-20b", 2880, 2880, 32, 4)
OLMOE = Model("olmoe-1b-7b", 2048, 1024, 64, 8)
MIXTRAL = Model("mixtral-8x7b", 4096, 14336, 8, 2)
DEEPSEEK = Model("deepseek-v3-tp8", 7168, 256, 256, 8)
MODELS = {model.name: model for model in (QWEN3, GPT_OSS, OLMOE, MIXTRAL, DEEPSEEK)}


@dataclass(frozen=True)
class Case:
    """One call of the operator.

    ``op`` is ``w13`` (gate and up: hidden to two slices of intermediate, one row of x a token) or
    ``w2`` (down: intermediate to hidden, one row of x a pair, multiplied by the routed weight).
    """

    model: Model
    op: str
    tokens: int
    #: Rank that the weights are allocated for.
    rank: int
    #: Adapter slots, each with an adapter that some token uses, as far as the tokens go.
    adapters: int
    dtype: str = "bf16"
    #: How tokens choose experts: ``uniform``, ``zipf`` (expert i with weight 1/i), or ``half`` (every second
    #: token has the same expert among its own).
    routing: str = "uniform"
    #: Rank that the adapters really have, the rest of the allocation being zeros; None: ``rank``.
    own_rank: int | None = None

    def __post_init__(self) -> None:
        """Refuses what is no case, and says which field is at fault."""
        for field, allowed in (
            ("op", ("w13", "w2")),
            ("dtype", ("bf16", "f16")),
            ("routing", ("uniform", "zipf", "half")),
        ):
            if getattr(self, field) not in allowed:
                raise ValueError(f"{field}: {getattr(self, field)!r} is none of {', '.join(allowed)}")
        for field in ("tokens", "rank", "adapters"):
            if not (isinstance(getattr(self, field), int) and getattr(self, field) > 0):
                raise ValueError(f"{field}: expected a positive integer, got {getattr(self, field)!r}")
        if not 0 < self.used_rank <= self.rank:
            raise ValueError(f"own_rank: expected 1 to {self.rank}, got {self.own_rank!r}")

    @property
    def k(self) -> int:
        """Input width."""
        return self.model.hidden if self.op == "w13" else self.model.intermediate

    @property
    def n(self) -> int:
        """Output width of one slice."""
        return self.model.intermediate if self.op == "w13" else self.model.hidden

    @property
    def slices(self) -> int:
        """Matrices side by side in the output: gate and up, or down alone."""
        return 2 if self.op == "w13" else 1

    @property
    def pairs(self) -> int:
        """(token, choice) pairs."""
        return self.tokens * self.model.top_k

    @property
    def x_rows(self) -> int:
        """Rows of x."""
        return self.tokens if self.op == "w13" else self.pairs

    @property
    def used_rank(self) -> int:
        """Rank in use."""
        return self.rank if self.own_rank is None else self.own_rank

    def describe(self) -> str:
        """The case in a line."""
        rank = f"R={self.rank}" if self.own_rank is None else f"R={self.own_rank} in {self.rank}"
        extra = "".join(f" {part}" for part in (self.dtype, self.routing) if part not in ("bf16", "uniform"))
        return f"{self.model.name} {self.op} T={self.tokens} {rank} {self.adapters} adapters{extra}"

    def to_json(self) -> dict[str, Any]:
        """The case as :meth:`from_json` takes it."""
        return asdict(self)

    @staticmethod
    def from_json(fields: dict[str, Any]) -> Case:
        """A case from an object whose ``model`` is a name of :data:`MODELS` or an object of sizes."""
        fields = dict(fields)
        model = fields.pop("model", None)
        if isinstance(model, str) and model in MODELS:
            named = MODELS[model]
        elif isinstance(model, dict):
            named = Model(**model)
        else:
            raise ValueError(f"model: expected one of {', '.join(MODELS)}, or its sizes; got {model!r}")
        try:
            return Case(model=named, **fields)
        except TypeError as error:
            raise ValueError(str(error)) from None


@dataclass(frozen=True)
class DenseCase:
    """One call of a dense layer: one x, and slices of widths of their own."""

    model: str
    #: ``qkv`` (three slices of attention's input) or ``o`` (one of its output).
    op: str
    in_dim: int
    out_dims: tuple[int, ...]
    tokens: int
    rank: int
    adapters: int
    dtype: str = "bf16"

    @property
    def width(self) -> int:
        """Width of the output."""
        return sum(self.out_dims)

    @property
    def matrices(self) -> int:
        """Elements of the matrices of one adapter."""
        return self.rank * (len(self.out_dims) * self.in_dim + self.width)

    def describe(self) -> str:
        """The case in a line."""
        return f"{self.model} {self.op} T={self.tokens} R={self.rank} {self.adapters} adapters"

    def to_json(self) -> dict[str, Any]:
        """The case as :meth:`from_json` takes it."""
        return asdict(self)

    @staticmethod
    def from_json(fields: dict[str, Any]) -> DenseCase:
        """A case from what :meth:`to_json` made."""
        return DenseCase(**{**fields, "out_dims": tuple(fields["out_dims"])})


def dense(quick_run: bool) -> list[DenseCase]:
    """Attention of Qwen3-30B-A3B: q, k and v in one call, and o."""
    tokens = (1, 80, 8192) if quick_run else (1, 16, 80, 1024, 8192)
    layers: list[tuple[str, int, tuple[int, ...]]] = [("qkv", 2048, (4096, 512, 512)), ("o", 4096, (2048,))]
    return [
        DenseCase(QWEN3.name, op, in_dim, out_dims, t, rank=64, adapters=2)
        for op, in_dim, out_dims in layers
        for t in tokens
    ]


def read(path: Path) -> list[Case]:
    """The cases of a JSON file: a list of objects, as :meth:`Case.from_json` takes them."""
    listed = json.loads(path.read_text())
    if not isinstance(listed, list):
        raise ValueError(f"{path}: expected a list of cases")
    return [Case.from_json(fields) for fields in listed]


def _qwen3(op: str, tokens: Iterable[int], **fields: Any) -> Iterator[Case]:
    return (Case(QWEN3, op, t, **{"rank": 64, "adapters": 2, **fields}) for t in tokens)


def design() -> list[Case]:
    """The table of docs/PERFORMANCE.md."""
    return [
        *_qwen3("w13", (1, 4, 16, 80, 256, 1024, 4096, 16384)),
        *_qwen3("w13", (80, 2048), rank=16),
        *_qwen3("w2", (1, 16, 80, 1024, 4096, 16384)),
        *(Case(GPT_OSS, "w13", t, rank=32, adapters=4) for t in (64, 2048)),
        Case(OLMOE, "w13", 64, rank=16, adapters=8),
    ]


def headline() -> list[Case]:
    """The six rows of README.md."""
    return [*_qwen3("w13", (1, 80, 1024, 16384)), *_qwen3("w2", (80, 1024))]


def chart() -> list[Case]:
    """The lines of the chart: every power of two from one token to 16,384."""
    tokens = [1 << power for power in range(15)]
    return [*_qwen3("w13", tokens), *_qwen3("w2", tokens)]


def variety() -> list[Case]:
    """Other models, types, routings and ranks."""
    return [
        *_qwen3("w13", (80, 1024), dtype="f16"),
        *_qwen3("w2", (80,), dtype="f16"),
        *_qwen3("w13", (80, 1024), routing="zipf"),
        *_qwen3("w2", (1024,), routing="zipf"),
        *_qwen3("w13", (80, 1024), rank=128, own_rank=8),
        Case(GPT_OSS, "w2", 2048, rank=32, adapters=4),
        Case(OLMOE, "w13", 2048, rank=16, adapters=8),
        Case(MIXTRAL, "w13", 64, rank=64, adapters=2),
        Case(MIXTRAL, "w2", 512, rank=64, adapters=2),
        Case(DEEPSEEK, "w13", 64, rank=32, adapters=2),
        Case(DEEPSEEK, "w2", 1024, rank=32, adapters=2),
    ]


def quick() -> list[Case]:
    """A few cases, for a look in passing."""
    return [*_qwen3("w13", (1, 16, 80, 1024, 16384)), *_qwen3("w2", (1, 80, 1024, 16384))]


def everything() -> list[Case]:
    """All of the above, each case once."""
    return list(dict.fromkeys([*design(), *chart(), *variety()]))


def layers(quick_run: bool) -> list[tuple[Case, Case]]:
    """w13 and w2 of whole layers, routed once."""
    tokens = (80, 16384) if quick_run else (80, 1024, 16384)
    return list(zip(_qwen3("w13", tokens), _qwen3("w2", tokens), strict=True))


def routes(quick_run: bool) -> list[Case]:
    """Routing alone, of 640 to 1,048,576 pairs."""
    tokens = (80, 16384) if quick_run else (80, 1024, 16384, 131072)
    return list(_qwen3("w13", tokens))
