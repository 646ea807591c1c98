"""Dense layers, slices of their own widths, shared factors, rows by index and adapters by address, on a GPU,
each against a plain formula in float64."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest

torch = pytest.importorskip("torch", reason="PyTorch is not installed")

import moe_lora  # noqa: E402
from reference import check  # noqa: E402

pytestmark = pytest.mark.gpu
BF16 = torch.bfloat16


@dataclass
class Layer:
    """A call's tensors, with as many experts as tokens may choose from; one is a dense layer."""

    tokens: int
    experts: int = 6
    top_k: int = 3
    slots: int = 3
    rank: int = 16
    in_dim: int = 64
    out_dims: list[int] = field(default_factory=lambda: [96, 32, 48])
    x_rows: int | None = None
    dtype: torch.dtype = BF16

    def __post_init__(self) -> None:
        self.random = torch.Generator("cuda").manual_seed(self.tokens)
        self.x = self.normal(self.x_rows or self.tokens, self.in_dim)
        shapes = [(self.rank, self.in_dim)] * len(self.out_dims)
        self.a = [self.normal(self.slots, self.experts, *shape, scale=self.in_dim**-0.5) for shape in shapes]
        shapes = [(n, self.rank) for n in self.out_dims]
        self.b = [self.normal(self.slots, self.experts, *shape, scale=self.rank**-0.5) for shape in shapes]
        self.base = self.normal(self.tokens, self.top_k, sum(self.out_dims))
        scores = torch.rand(self.tokens, self.experts, generator=self.random, device="cuda")
        self.ids = scores.topk(self.top_k).indices.to(torch.int32)
        # More than there are tokens: what is after them is not read.
        lora = torch.randint(
            -1, self.slots, (self.tokens + 5,), generator=self.random, device="cuda", dtype=torch.int32
        )
        self.lora = lora

    def normal(self, *shape: int, scale: float = 1.0) -> torch.Tensor:
        values = torch.randn(*shape, generator=self.random, device="cuda") * scale
        return values.to(self.dtype)

    @property
    def pairs(self) -> int:
        return self.tokens * self.top_k

    def delta(
        self,
        *,
        x: torch.Tensor | None = None,
        adapters: dict[tuple[int, int], tuple[torch.Tensor, torch.Tensor, float]] | None = None,
    ) -> list[torch.Tensor]:
        """For each slice `[P, N]` in float64: scaling · b @ (a @ x), zero where there is no adapter.

        `x` has a row a pair; `adapters` has a, b and scaling of (slot, slice), in place of the stacked ones.
        """
        rows = self.x[torch.arange(self.pairs, device="cuda") // self.top_k] if x is None else x
        expert = self.ids.reshape(-1).long()
        slot = self.lora[: self.tokens].repeat_interleave(self.top_k)
        deltas = []
        for s, n in enumerate(self.out_dims):
            delta = torch.zeros(self.pairs, n, dtype=torch.float64, device="cuda")
            for number in range(self.slots):
                pairs = torch.nonzero(slot == number).reshape(-1)
                if adapters is None:
                    a, b, scaling = self.a[s][number], self.b[s][number], 1.0
                elif (number, s) in adapters:
                    a, b, scaling = adapters[number, s]
                else:
                    continue
                a, b = (m.double().expand(self.experts, -1, -1)[expert[pairs]] for m in (a, b))
                h = torch.einsum("prk,pk->pr", a, rows[pairs].double())
                delta[pairs] = torch.einsum("pnr,pr->pn", b, h) * scaling
            deltas.append(delta)
        return deltas

    def expected(self, deltas: list[torch.Tensor]) -> torch.Tensor:
        return self.base.double() + torch.cat(deltas, dim=1).view_as(self.base)

    def forward(self, out: torch.Tensor, **change: Any) -> None:
        call: dict[str, Any] = dict(
            x=self.x, a=self.a, b=self.b, topk_ids=self.ids, token_lora=self.lora, out=out
        )
        moe_lora.forward(**(call | change))


def close(got: torch.Tensor, expected: torch.Tensor) -> None:
    check(got, expected.float())


def dense(tokens: int, **more: Any) -> Layer:
    return Layer(tokens, experts=1, top_k=1, **more)


@pytest.mark.parametrize("tokens", [1, 16, 80, 300, 2000])
@pytest.mark.parametrize("flat", [False, True])
def test_dense_layers(tokens: int, flat: bool) -> None:
    """q, k and v in one call, with the dimension of the experts and without it."""
    layer = dense(tokens)
    out = layer.base.clone()
    change: dict[str, Any] = dict(topk_ids=None)
    if flat:
        change |= dict(a=[a[:, 0] for a in layer.a], b=[b[:, 0] for b in layer.b], out=out[:, 0])
    layer.forward(**(dict(out=out) | change))
    close(out, layer.expected(layer.delta()))
    bare = layer.lora[:tokens] < 0
    assert torch.equal(out[bare], layer.base[bare])


def test_a_dense_route_serves_the_next_projection() -> None:
    qkv, o = dense(70), dense(70, in_dim=96, out_dims=[64])
    o.lora = qkv.lora
    sizes = dict(experts=1, slots=3, max_rank=16)
    workspace = moe_lora.Workspace(70, top_k=1, slices=3, **sizes)
    moe_lora.route(None, qkv.lora, tokens=70, workspace=workspace, **sizes)
    for layer in (qkv, o):
        out = layer.base.clone()
        layer.forward(out[:, 0], topk_ids=None, token_lora=None, workspace=workspace)
        close(out, layer.expected(layer.delta()))


def test_a_dense_layer_in_two_halves() -> None:
    layer = dense(70)
    h = torch.full((3, 70, 16), float("nan"), dtype=BF16, device="cuda")
    moe_lora.shrink(layer.x, layer.a, None, layer.lora, h)
    out = layer.base.clone()
    moe_lora.expand(h, layer.b, None, layer.lora, out[:, 0])
    close(out, layer.expected(layer.delta()))


@pytest.mark.parametrize("tokens", [1, 40, 600])
def test_slices_of_their_own_widths(tokens: int) -> None:
    layer = Layer(tokens, out_dims=[96, 8, 51])
    out = layer.base.clone()
    layer.forward(out)
    close(out, layer.expected(layer.delta()))


def test_ids_of_64_bits() -> None:
    layer = Layer(60)
    outs = [layer.base.clone() for _ in range(2)]
    wide = layer.ids.long()
    layer.forward(outs[0])
    layer.forward(outs[1], topk_ids=wide)
    assert torch.equal(*outs)
    # Of 32 bits alone this would be expert 0.
    wide[3, 1] = 1 << 32
    out = layer.base.clone()
    layer.forward(out, topk_ids=wide)
    assert torch.equal(out[3, 1], layer.base[3, 1])


@pytest.mark.parametrize("which", [["a"], ["b"], ["a", "b"]])
def test_a_stride_of_0_is_a_shared_factor(which: list[str]) -> None:
    layer = Layer(80)
    one: dict[str, Any] = dict(experts=layer.experts)
    expanded: dict[str, Any] = {}
    for name in which:
        factor = [matrices[:, :1].contiguous() for matrices in getattr(layer, name)]
        one[name] = factor
        expanded[name] = [matrices.expand(-1, layer.experts, -1, -1) for matrices in factor]
        setattr(layer, name, expanded[name])
    outs = [layer.base.clone() for _ in range(2)]
    layer.forward(outs[0], **one)
    layer.forward(outs[1], **expanded)
    close(outs[1], layer.expected(layer.delta()))
    assert torch.equal(*outs)


@pytest.mark.parametrize("order", ["in_order", "reversed", "interleaved"])
def test_orders_of_columns(order: str) -> None:
    layer = Layer(60, out_dims=[48, 48])
    deltas = layer.delta()
    expected = {
        "in_order": deltas,
        "reversed": deltas[::-1],
        "interleaved": [torch.stack(deltas, dim=2).flatten(1)],
    }
    out = layer.base.clone()
    layer.forward(out, order=order)
    close(out, layer.expected(expected[order]))


@pytest.mark.parametrize("form", ["flat", "pairs"])
@pytest.mark.parametrize("kept", [False, True])
def test_rows_by_index(kept: bool, form: str) -> None:
    layer = Layer(50, x_rows=70)
    pairs = layer.pairs
    x_index = torch.randint(0, 70, (pairs,), generator=layer.random, device="cuda", dtype=torch.int32)
    rows = torch.randperm(pairs + 20, generator=layer.random, device="cuda")
    out_index = rows[:pairs].to(torch.int32)
    deltas = layer.delta(x=layer.x[x_index.long()])
    # A row that is not there, at both ends.
    x_index[4], x_index[5], out_index[9], out_index[10] = -1, 70, -1, pairs + 20
    written = torch.cat(deltas, dim=1)
    written[[4, 5, 9, 10]] = 0
    base = layer.normal(pairs + 20, sum(layer.out_dims))
    expected = base.double()
    keep = torch.ones(pairs, dtype=torch.bool, device="cuda")
    keep[[9, 10]] = False
    expected[out_index[keep].long()] += written[keep]
    out = base.clone()
    change: dict[str, Any] = dict(x_index=x_index, out_index=out_index)
    if form == "pairs" or kept:
        change = {name: index.view(50, layer.top_k) for name, index in change.items()}
    if kept:
        moe_lora.route(layer.ids, layer.lora, experts=6, slots=3, max_rank=16)
        change |= dict(topk_ids=None, token_lora=None)
    layer.forward(out, **change)
    close(out, expected)


RANKS = [8, 13, 16]
SCALINGS = [0.5, 1.0, 3.0]


def table_of(layer: Layer, **more: Any) -> moe_lora.AdapterTable:
    return moe_lora.AdapterTable(
        layer.slots,
        out_dims=layer.out_dims,
        in_dim=layer.in_dim,
        experts=layer.experts,
        dtype=layer.dtype,
        device="cuda",
        max_rank=layer.rank,
        **more,
    )


Adapters = dict[tuple[int, int], tuple[torch.Tensor, torch.Tensor, float]]


def adapter(layer: Layer, rank: int, scaling: float, a_experts: int | None = None) -> list[Any]:
    """a, b and scaling of each slice, of random values."""
    a_experts = a_experts or layer.experts
    return [
        (
            layer.normal(a_experts, rank, layer.in_dim, scale=layer.in_dim**-0.5),
            layer.normal(layer.experts, n, rank, scale=rank**-0.5),
            scaling,
        )
        for n in layer.out_dims
    ]


def fill(table: moe_lora.AdapterTable, slot: int, parts: list[Any], adapters: Adapters) -> None:
    table.set(
        slot, [a for a, _, _ in parts], [b for _, b, _ in parts], scaling=[scaling for _, _, scaling in parts]
    )
    adapters |= {(slot, s): part for s, part in enumerate(parts)}


@pytest.mark.parametrize("tokens", [1, 50, 700])
@pytest.mark.parametrize("kind", [Layer, dense])
@pytest.mark.parametrize("shared_a", [False, True])
def test_a_table(shared_a: bool, kind: Callable[..., Layer], tokens: int) -> None:
    """Adapters of their own ranks and scalings, one of which leaves a slice alone."""
    layer = kind(tokens)
    table, adapters = table_of(layer, shared_a=shared_a), Adapters()
    for slot, (rank, scaling) in enumerate(zip(RANKS, SCALINGS, strict=True)):
        fill(table, slot, adapter(layer, rank, scaling, 1 if shared_a else None), adapters)
    a, b, _ = zip(*(adapters[1, s] for s in range(3)), strict=True)
    table.set(1, [a[0], None, a[2]], [b[0], None, b[2]], scaling=SCALINGS[1])
    del adapters[1, 1]
    out = layer.base.clone()
    ids = layer.ids if layer.experts > 1 else None
    layer.forward(out, a=None, b=None, table=table, topk_ids=ids)
    close(out, layer.expected(layer.delta(adapters=adapters)))


def test_a_table_in_two_halves() -> None:
    layer = Layer(50)
    table, adapters = table_of(layer), Adapters()
    for slot, rank in enumerate(RANKS):
        fill(table, slot, adapter(layer, rank, 2.0), adapters)
    h = torch.full((3, 50, 3, 16), float("nan"), dtype=BF16, device="cuda")
    moe_lora.shrink(layer.x, table=table, topk_ids=layer.ids, token_lora=layer.lora, h=h)
    out = layer.base.clone()
    moe_lora.expand(h, table=table, out=out)
    close(out, layer.expected(layer.delta(adapters=adapters)))


def test_an_adapter_is_exchanged_between_two_calls() -> None:
    layer = Layer(120)
    table, adapters = table_of(layer), Adapters()
    for slot in range(3):
        fill(table, slot, adapter(layer, 16, 1.0), adapters)
    outs, expected = [], []
    for step in range(4):
        if step == 3:
            table.remove(1)
            for s in range(3):
                del adapters[1, s]
        elif step:
            fill(table, step, adapter(layer, 8 * step, 0.5 * step), adapters)
        expected.append(layer.expected(layer.delta(adapters=adapters)))
        # Queued behind a long wait: what is replaced is still read when this returns.
        torch.cuda._sleep(5_000_000)
        outs.append(layer.base.clone())
        layer.forward(outs[-1], a=None, b=None, table=table)
    for out, right in zip(outs, expected, strict=True):
        close(out, right)


def test_an_exchange_waits_for_nothing() -> None:
    layer = Layer(20)
    table = table_of(layer)
    parts = adapter(layer, 13, 1.0)
    # The first takes pinned memory, which the driver may wait for.
    fill(table, 0, parts, Adapters())
    torch.cuda.synchronize()
    torch.cuda._sleep(50_000_000)
    fill(table, 0, parts, Adapters())
    assert not torch.cuda.current_stream().query(), "it waited for the device"


def test_a_replayed_graph_sees_the_exchange() -> None:
    layer = Layer(60)
    table, adapters = table_of(layer), Adapters()
    for slot in range(3):
        fill(table, slot, adapter(layer, 16, 1.0), adapters)
    out = layer.base.clone()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        layer.forward(out, a=None, b=None, table=table)
        with pytest.raises(ValueError, match="outside the capture of a graph"):
            table.remove(0)
    for rank in (5, 16):
        fill(table, 2, adapter(layer, rank, 1.5), adapters)
        out.copy_(layer.base)
        graph.replay()
        close(out, layer.expected(layer.delta(adapters=adapters)))


def test_a_table_and_ranks_of_the_call() -> None:
    """The smaller of both is in use."""
    layer = Layer(40)
    table, adapters = table_of(layer), Adapters()
    for slot, rank in enumerate(RANKS):
        fill(table, slot, adapter(layer, rank, 1.0), adapters)
    ranks = torch.tensor([16, 4, 9], dtype=torch.int32, device="cuda")
    cut = {
        (slot, s): (a[:, : ranks[slot]], b[..., : ranks[slot]], scaling)
        for (slot, s), (a, b, scaling) in adapters.items()
    }
    out = layer.base.clone()
    layer.forward(out, a=None, b=None, table=table, ranks=ranks)
    close(out, layer.expected(layer.delta(adapters=cut)))
