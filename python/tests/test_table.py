"""What `AdapterTable` writes into its entries, and what it refuses. Needs PyTorch and no GPU: a table on the
CPU can be filled, though no call takes it."""

from __future__ import annotations

import re
import struct
from typing import Any

import pytest

torch = pytest.importorskip("torch", reason="PyTorch is not installed")

import moe_lora  # noqa: E402

L, E, R, K, N = 3, 4, 16, 32, [24, 8]
BF16 = torch.bfloat16


def make(**change: Any) -> moe_lora.AdapterTable:
    sizes = dict(slots=L, out_dims=N, in_dim=K, experts=E, dtype=BF16, device="cpu", max_rank=R)
    return moe_lora.AdapterTable(**(sizes | change))


def tensors(rank: int, experts: int = E) -> dict[str, list[torch.Tensor]]:
    return dict(
        a=[torch.randn(experts, rank, K).to(BF16) for _ in N],
        b=[torch.randn(experts, n, rank).to(BF16) for n in N],
    )


def entries(table: moe_lora.AdapterTable) -> list[list[tuple[Any, ...]]]:
    """rank, allocated rank, scaling, 0, address of a, address of b: for each slot and slice."""
    return [[struct.unpack("<iIfIQQ", bytes(entry.tolist())) for entry in slot] for slot in table.entries]


OFF = (0, 0, 0.0, 0, 0, 0)


def test_entries_name_the_tensors_themselves() -> None:
    table = make()
    adapter = tensors(8)
    table.set(1, **adapter, scaling=[0.5, 2.0])
    pairs = zip(adapter["a"], adapter["b"], (0.5, 2.0), strict=True)
    expected = [(8, 8, scaling, 0, a.data_ptr(), b.data_ptr()) for a, b, scaling in pairs]
    assert entries(table) == [[OFF, OFF], expected, [OFF, OFF]]
    table.remove(1)
    assert entries(table) == [[OFF, OFF]] * L


def test_a_slice_may_be_left_alone() -> None:
    table, adapter = make(), tensors(16)
    table.set(0, [None, adapter["a"][1]], [None, adapter["b"][1]], rank=[None, 12])
    first, second = entries(table)[0]
    assert first == OFF and second[:2] == (12, 16)


def test_a_rank_that_is_no_multiple_of_8_is_padded_with_zeros() -> None:
    table, adapter = make(), tensors(5)
    table.set(2, **adapter)
    for (rank, room, _, _, a_at, b_at), a, b in zip(
        entries(table)[2], adapter["a"], adapter["b"], strict=True
    ):
        assert (rank, room) == (5, 8) and a_at % 16 == b_at % 16 == 0
        held = {tensor.data_ptr(): tensor for tensor in table._kept[2]}
        assert torch.equal(held[a_at][:, :5], a) and torch.equal(held[b_at][..., :5], b)
        assert not held[a_at][:, 5:].any() and not held[b_at][..., 5:].any()


def test_tensors_that_kernels_cannot_load_are_copied() -> None:
    table = make(slots=1)
    gaps = torch.randn(E, 8, 2 * K).to(BF16)[..., :K]
    unaligned = torch.randn(E * N[1] * 8 + 1).to(BF16)[1:].view(E, N[1], 8)
    adapter = tensors(8)
    table.set(0, [gaps, adapter["a"][1]], [adapter["b"][0], unaligned])
    first, second = entries(table)[0]
    held = {tensor.data_ptr(): tensor for tensor in table._kept[0]}
    assert first[4] != gaps.data_ptr() and torch.equal(held[first[4]], gaps)
    assert second[5] % 16 == 0 and torch.equal(held[second[5]], unaligned)
    assert first[5] == adapter["b"][0].data_ptr() and second[4] == adapter["a"][1].data_ptr()


def test_a_shared_factor_has_one_matrix_in_any_form() -> None:
    table, adapter = make(shared_a=True), tensors(8)
    for a in (adapter["a"][0][:1], adapter["a"][0][0], adapter["a"][0][:1].expand(E, -1, -1)):
        table.set(0, [a, a], adapter["b"])
        assert [entry[4] for entry in entries(table)[0]] == [a.data_ptr()] * 2
    with pytest.raises(ValueError, match=re.escape("a[0]: expected shape [1, r, 32], got shape [4, 8, 32]")):
        table.set(0, **adapter)


def test_a_dense_layer_has_matrices() -> None:
    table = make(experts=1, out_dims=[24])
    a, b = torch.randn(8, K).to(BF16), torch.nn.Parameter(torch.randn(24, 8).to(BF16))
    table.set(0, a, b)
    assert entries(table)[0] == [(8, 8, 1.0, 0, a.data_ptr(), b.data_ptr())]


def test_it_keeps_what_it_names() -> None:
    import gc
    import weakref

    table, adapter = make(), tensors(8)
    storage = weakref.ref(adapter["a"][0].untyped_storage())
    address = adapter["a"][0].data_ptr()
    table.set(0, **adapter)
    del adapter
    gc.collect()
    assert any(tensor.data_ptr() == address for tensor in table._kept[0])
    table.set(0, **tensors(8))
    gc.collect()
    assert storage() is None or all(tensor.data_ptr() != address for tensor in table._kept[0])


def test_it_may_be_written_in_inference_mode_and_out_of_it() -> None:
    with torch.inference_mode():
        table = make()
        table.set(0, **tensors(5))
    table.set(0, **tensors(8))
    assert entries(table)[0][0][0] == 8


GOOD = tensors(8)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(slot=3), "slot: expected 0 to 2, got 3"),
        (dict(slot=-1), "slot: expected 0 to 2, got -1"),
        (dict(a=GOOD["a"][:1]), "a: expected 2 slices, got 1"),
        (dict(b=GOOD["b"][0]), "b: expected 2 slices, got 1"),
        (dict(a=[None, GOOD["a"][1]]), "a[0]: expected a tensor as b[0] is, got None"),
        (dict(b=[GOOD["b"][0], None]), "b[1]: expected a tensor as a[1] is, got None"),
        (dict(a=[3, GOOD["a"][1]]), "a[0]: expected a tensor of PyTorch's, got int"),
        (dict(a=[a.float() for a in GOOD["a"]]), "a[0]: expected bfloat16, got float32"),
        (dict(a=[a.to("meta") for a in GOOD["a"]]), "a[0]: expected a tensor on cpu, got one on meta"),
        (dict(a=[a[:3] for a in GOOD["a"]]), "a[0]: expected shape [4, r, 32], got shape [3, 8, 32]"),
        (dict(a=[a[0] for a in GOOD["a"]]), "a[0]: expected shape [4, r, 32], got shape [8, 32]"),
        (dict(a=[a[..., :8] for a in GOOD["a"]]), "a[0]: expected shape [4, r, 32], got shape [4, 8, 8]"),
        (dict(a=[a[:, :0] for a in GOOD["a"]]), "a[0]: expected a rank of 1 to 16, got shape [4, 0, 32]"),
        (dict(a=tensors(17)["a"]), "a[0]: expected a rank of 1 to 16, got shape [4, 17, 32]"),
        (dict(b=GOOD["b"][::-1]), "b[0]: expected shape [4, 24, 8], got shape [4, 8, 8]"),
        (dict(b=tensors(16)["b"]), "b[0]: expected shape [4, 24, 8], got shape [4, 24, 16]"),
        (dict(rank=9), "rank: expected 0 to 8, got 9"),
        (dict(rank=-1), "rank: expected 0 to 8, got -1"),
        (dict(rank=[8]), "rank: expected one or 2 values, got 1"),
        (dict(scaling=float("inf")), "scaling: expected a finite number of 32 bits, got inf"),
        (dict(scaling=1e39), "scaling: expected a finite number of 32 bits, got 1e+39"),
        (dict(scaling=[1.0, 2.0, 3.0]), "scaling: expected one or 2 values, got 3"),
    ],
)
def test_what_does_not_fit_is_refused(change: dict[str, Any], message: str) -> None:
    table = make()
    table.set(0, **tensors(16))
    before = table.entries.clone()
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        table.set(**(dict(slot=0, **GOOD) | change))
    assert torch.equal(table.entries, before)


def test_what_is_no_table_is_refused() -> None:
    with pytest.raises(ValueError, match="dtype: expected bfloat16 or float16, got float32"):
        make(dtype=torch.float32)
    with pytest.raises(ValueError, match="slots is 0, expected at least 1"):
        make(slots=0)
    with pytest.raises(ValueError, match="slot: expected 0 to 2, got 3"):
        make().remove(3)


def test_a_rank_over_the_tables_is_not_used() -> None:
    """R = 12 has room for 16 in steps of 8; 12 of them are in use unless less is asked for."""
    table = make(max_rank=12)
    table.set(0, **tensors(16))
    assert entries(table)[0][0][:2] == (12, 16)
