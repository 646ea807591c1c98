"""Each wrong argument is one ValueError that says what was expected and what came. Needs no GPU, no
PyTorch."""

from __future__ import annotations

import re
from typing import Any

import moe_lora
import pytest
from fakes import CPU, CUDA, Fake
from moe_lora import _native

T, K_TOP, E, L, R, K, N = 6, 2, 4, 2, 8, 16, 24
I32 = dict(dtype="int32")


def weights(*shape: int, **more: Any) -> list[Fake]:
    return [Fake(*shape, **more), Fake(*shape, **more)]


def arguments() -> dict[str, Any]:
    """A call in which nothing is wrong."""
    return dict(
        x=Fake(T, K),
        a=weights(L, E, R, K),
        b=weights(L, E, N, R),
        topk_ids=Fake(T, K_TOP, **I32),
        token_lora=Fake(T, **I32),
        out=Fake(T, K_TOP, 2 * N),
        topk_weights=Fake(T, K_TOP, dtype="float32"),
        mul_routed_weight=True,
    )


# What is changed, and the whole message.
FORWARD: list[tuple[dict[str, Any], str]] = [
    # Shapes.
    (
        dict(x=Fake(5, K)),
        "x: expected shape [6, 16] (a row a token) or [12, 16] (a row a pair), got shape [5, 16]",
    ),
    (
        dict(x=Fake(T, 15)),
        "x: expected shape [6, 16] (a row a token) or [12, 16] (a row a pair), got shape [6, 15]",
    ),
    (dict(a=Fake(L, R, K)), "a: expected shape [L, E or 1, R, K], got shape [2, 8, 16]"),
    (
        dict(a=[Fake(L, E, R, K), Fake(L, E, 4, K)]),
        "a[1]: expected shape [2, 4, 8, 16], got shape [2, 4, 4, 16]",
    ),
    (dict(a=weights(L, 3, R, K)), "a[0]: expected shape [2, 4 or 1, 8, 16], got shape [2, 3, 8, 16]"),
    (dict(experts=8), "a[0]: expected shape [2, 8 or 1, 8, 16], got shape [2, 4, 8, 16]"),
    (dict(b=weights(3, E, N, R)), "b[0]: expected shape [2, E or 1, N, 8], got shape [3, 4, 24, 8]"),
    (dict(b=weights(L, E, N, 4)), "b[0]: expected shape [2, E or 1, N, 8], got shape [2, 4, 24, 4]"),
    (dict(b=weights(L, E, 25, R)), "out: expected shape [6, 2, ≥ 50], got shape [6, 2, 48]"),
    (dict(a=[]), "a: expected 1 to 4 slices, got 0"),
    (dict(a=weights(L, E, R, K) * 3), "a: expected 1 to 4 slices, got 6"),
    (dict(b=weights(L, E, N, R)[:1]), "b has 1 slices, expected 2"),
    (dict(topk_ids=Fake(T, 3, **I32)), "topk_ids: expected shape [6, 2], got shape [6, 3]"),
    (dict(topk_ids=Fake(T * K_TOP, **I32)), "topk_ids: expected shape [6, 2], got shape [12]"),
    (dict(token_lora=Fake(5, **I32)), "token_lora: expected shape [≥ 6], got shape [5]"),
    (dict(topk_weights=Fake(T, dtype="float32")), "topk_weights: expected shape [6, 2], got shape [6]"),
    (dict(topk_weights=None), "topk_weights: expected shape [6, 2] with mul_routed_weight, got None"),
    (dict(out=Fake(T * K_TOP, 2 * N)), "out: expected shape [T, k, ≥ offset + Σ N], got shape [12, 48]"),
    (dict(offset=1), "out: expected shape [6, 2, ≥ 49], got shape [6, 2, 48]"),
    (dict(adapter_enabled=Fake(1, **I32)), "adapter_enabled: expected shape [≥ 2], got shape [1]"),
    (dict(ranks=Fake(L, 1, **I32)), "ranks: expected shape [≥ 2], got shape [2, 1]"),
    (dict(expert_map=Fake(0, **I32)), "expert_map: expected shape [≥ 1], got shape [0]"),
    (dict(a=weights(L, E, 0, K), b=weights(L, E, N, 0)), "max_rank is 0, expected at least 1"),
    # Types.
    (dict(x=Fake(T, K, dtype="float32")), "x: expected bfloat16 or float16, got float32"),
    (dict(x=Fake(T, K, dtype="float16")), "a[0]: expected float16, got bfloat16"),
    (dict(out=Fake(T, K_TOP, 2 * N, dtype="float16")), "out: expected bfloat16, got float16"),
    (dict(topk_ids=Fake(T, K_TOP, dtype="int16")), "topk_ids: expected int32 or int64, got int16"),
    (dict(token_lora=Fake(T, dtype="int64")), "token_lora: expected int32, got int64"),
    (dict(topk_weights=Fake(T, K_TOP)), "topk_weights: expected float32, got bfloat16"),
    (
        dict(adapter_enabled=Fake(L, dtype="float32")),
        "adapter_enabled: expected int32 or uint8 or bool, got float32",
    ),
    (dict(ranks=Fake(L, dtype="uint8")), "ranks: expected int32, got uint8"),
    # Devices.
    (dict(x=Fake(T, K, device=(CPU, 0))), "x: expected a tensor on a CUDA device, got one on the CPU"),
    (
        dict(out=Fake(T, K_TOP, 2 * N, device=(CPU, 0))),
        "out: expected a tensor on a CUDA device, got one on the CPU",
    ),
    (
        dict(token_lora=Fake(T, device=(CUDA, 1), **I32)),
        "token_lora: expected a tensor on cuda:0, got cuda:1",
    ),
    (
        dict(b=[Fake(L, E, N, R), Fake(L, E, N, R, device=(CUDA, 3))]),
        "b[1]: expected a tensor on cuda:0, got cuda:3",
    ),
    # Strides.
    (
        dict(x=Fake(T, K, strides=[1, T])),
        "x: expected a contiguous innermost dimension, got shape [6, 16] with strides [1, 6]",
    ),
    (
        dict(x=Fake(T, K, strides=[8, 1])),
        "x: expected a row stride of at least 16, got shape [6, 16] with strides [8, 1]",
    ),
    (
        dict(a=weights(L, E, R, K, strides=[1024, 256, 32, 1])),
        "a[0]: expected a contiguous tensor, got shape [2, 4, 8, 16] with strides [1024, 256, 32, 1]",
    ),
    (
        dict(out=Fake(T, K_TOP, 2 * N, strides=[48, 288, 1])),
        "out: expected rows at equal distances, got shape [6, 2, 48] with strides [48, 288, 1]",
    ),
    (
        dict(out=Fake(T, K_TOP, 2 * N, strides=[192, 96, 2])),
        "out: expected a contiguous innermost dimension, got shape [6, 2, 48] with strides [192, 96, 2]",
    ),
    (
        dict(topk_ids=Fake(T, K_TOP, strides=[4, 1], **I32)),
        "topk_ids: expected a contiguous tensor, got shape [6, 2] with strides [4, 1]",
    ),
    # Things that are no tensors, and routes that are no routes.
    (dict(x=3), "x: expected a tensor (__dlpack__ or __cuda_array_interface__), got int"),
    (
        dict(a=[Fake(L, E, R, K), None]),
        "a[1]: expected a tensor (__dlpack__ or __cuda_array_interface__), got NoneType",
    ),
    (
        dict(topk_ids=None),
        "topk_ids: expected shape [6, 2], got None: only a dense layer has none, with E = 1 and k = 1, "
        "and this one has E = 4 and k = 2",
    ),
    (
        dict(token_lora=None),
        "topk_ids: expected with token_lora, or without it for the route that the workspace keeps",
    ),
    (
        dict(topk_ids=None, token_lora=None, ranks=Fake(L, **I32)),
        "ranks: expected with token_lora, or without it for the route that the workspace keeps",
    ),
    (
        dict(stream="default"),
        "stream: expected an address, a torch.cuda.Stream or an object with __cuda_stream__, got str",
    ),
]


# An expert's matrix for all experts of a slot, as PyTorch's `expand` leaves it.
SHARED_A, SHARED_B = [R * K, 0, K, 1], [N * R, 0, R, 1]

FORWARD += [
    # Weights.
    (dict(a=None), "a: expected tensors where there is no table, got None"),
    (dict(b=None), "b: expected tensors where there is no table, got None"),
    (dict(out=None), "out: expected a tensor, got None"),
    (
        dict(b=[Fake(L, E, N, R), Fake(L, E, 8, R), Fake(L, E, 8, R)]),
        "b has 3 slices, expected 2",
    ),
    (
        dict(b=[Fake(L, E, N, R), Fake(L, E, 25, R)]),
        "out: expected shape [6, 2, ≥ 49], got shape [6, 2, 48]",
    ),
    (
        dict(b=[Fake(L, E, N, R), Fake(L, E, N, 16)]),
        "b[1]: expected shape [2, 4, N, 8], got shape [2, 4, 24, 16]",
    ),
    (
        dict(a=[Fake(L, E, R, K, strides=SHARED_A), Fake(L, E, R, K)]),
        "a[1]: expected a matrix for all experts as a[0] has, "
        "got shape [2, 4, 8, 16] with strides [512, 128, 16, 1]",
    ),
    (
        dict(b=[Fake(L, E, N, R), Fake(L, E, N, R, strides=SHARED_B)]),
        "b[1]: expected a matrix an expert as b[0] has, got shape [2, 4, 24, 8] with strides [192, 0, 8, 1]",
    ),
    (
        dict(a=weights(L, E, R, K, strides=[E * R * K, 0, K, 1])),
        "a[0]: expected a tensor that is contiguous but for its experts, which share one matrix, "
        "got shape [2, 4, 8, 16] with strides [512, 0, 16, 1]",
    ),
    (
        dict(a=weights(L, 3, R, K, strides=SHARED_A)),
        "a[0]: expected shape [2, 4 or 1, 8, 16], got shape [2, 3, 8, 16]",
    ),
    # Rows and columns.
    (dict(order="up first"), "order: expected in_order, reversed or interleaved, got up first"),
    (dict(x_index=Fake(11, **I32)), "x_index: expected shape [12], got shape [11]"),
    (dict(x_index=Fake(T, 3, **I32)), "x_index: expected shape [12], got shape [6, 3]"),
    (dict(x_index=Fake(1, T, K_TOP, **I32)), "x_index: expected shape [P] or [T, k], got shape [1, 6, 2]"),
    (dict(x_index=Fake(12, dtype="int64")), "x_index: expected int32, got int64"),
    (dict(x_index=Fake(12, **I32), x=Fake(3, 15)), "x: expected shape [rows, 16], got shape [3, 15]"),
    (dict(out_index=Fake(11, **I32)), "out_index: expected shape [12], got shape [11]"),
    (
        dict(out_index=Fake(12, **I32), out=Fake(50)),
        "out: expected shape [rows, ≥ offset + Σ N], got shape [50]",
    ),
    (
        dict(out_index=Fake(12, **I32), out=Fake(50, 40)),
        "out: expected shape [50, ≥ 48], got shape [50, 40]",
    ),
    (
        dict(out_index=Fake(12, **I32), topk_ids=None, token_lora=None),
        "out_index: expected shape [T, k], as there is no topk_ids to tell T from k, got shape [12]",
    ),
    (
        dict(b=[Fake(L, E, 16, R), Fake(L, E, 8, R)], order="interleaved"),
        "interleaved slices have the widths 16+8, expected one width",
    ),
]


def says(message: str) -> str:
    return f"^{re.escape(message)}$"


@pytest.mark.parametrize(
    ("change", "message"), FORWARD, ids=lambda value: value if isinstance(value, str) else ""
)
def test_forward_refuses(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=says(message)):
        moe_lora.forward(**(arguments() | change))


def dense(**change: Any) -> dict[str, Any]:
    """A call of a dense layer in which nothing is wrong: slices of their own widths, and no experts."""
    call = dict(
        x=Fake(T, K),
        a=weights(L, R, K),
        b=[Fake(L, N, R), Fake(L, 8, R)],
        topk_ids=None,
        token_lora=Fake(T + 3, **I32),
        out=Fake(T, N + 8),
    )
    return call | change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(token_lora=Fake(5, **I32)), "token_lora: expected shape [≥ 6], got shape [5]"),
        (
            dict(x=Fake(7, K)),
            "x: expected shape [6, 16] (a row a token) or [6, 16] (a row a pair), got shape [7, 16]",
        ),
        (dict(out=Fake(T, N)), "out: expected shape [6, ≥ 32], got shape [6, 24]"),
        (dict(out=Fake(T, 1, N)), "out: expected shape [6, 1, ≥ 32], got shape [6, 1, 24]"),
        (
            dict(out=Fake(T, 2, N + 8)),
            "a[0]: expected shape [L, E or 1, R, K], got shape [2, 8, 16]",
        ),
        (dict(experts=2), "a[0]: expected shape [L, E or 1, R, K], got shape [2, 8, 16]"),
        (dict(b=[Fake(L, N, R), Fake(L, 1, 8, R)]), "b[1]: expected shape [2, N, 8], got shape [2, 1, 8, 8]"),
        (
            dict(b=[Fake(L, E, N, R), Fake(L, E, 8, R)]),
            "a[0]: expected shape [2, 4 or 1, 8, 16], got shape [2, 8, 16]",
        ),
        (
            dict(topk_ids=Fake(T, 1, **I32)),
            "out: expected shape [T, k, ≥ offset + Σ N], got shape [6, 32]",
        ),
        (dict(expert_map=Fake(1, **I32)), "expert_map: expected with topk_ids, which it maps"),
        (
            dict(out_index=Fake(5, **I32)),
            "x: expected shape [5, 16] (a row a token) or [5, 16] (a row a pair), got shape [6, 16]",
        ),
    ],
)
def test_dense_refuses(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=says(message)):
        moe_lora.forward(**dense(**change))


def table(entries: Any = None, **change: Any) -> Any:
    """A table for the sizes of `arguments`, on entries that nobody may read."""
    sizes = dict(dtype="bfloat16", slots=L, experts=E, max_rank=R, in_dim=K, out_dims=[N, N], shared_a=False)
    return _native.Table(entries or Fake(L, 2, 32, dtype="uint8"), **(sizes | change))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(a=weights(L, E, R, K)), "a: expected without table, got both"),
        (dict(b=weights(L, E, N, R)), "b: expected without table, got both"),
        (dict(table=table(dtype="float16")), "table: expected one of bfloat16, got one of float16"),
        (
            dict(table=table(in_dim=24)),
            "x: expected shape [6, 24] (a row a token) or [12, 24] (a row a pair), got shape [6, 16]",
        ),
        (dict(table=table(out_dims=[N, 32])), "out: expected shape [6, 2, ≥ 56], got shape [6, 2, 48]"),
        (dict(experts=8), "experts: expected 4 as the table has, got 8"),
        (dict(adapter_enabled=Fake(1, **I32)), "adapter_enabled: expected shape [≥ 2], got shape [1]"),
        (
            dict(table=table(Fake(L, 2, 32, dtype="uint8", device=(CPU, 0)))),
            "table: expected a tensor on a CUDA device, got one on the CPU",
        ),
        (
            dict(table=table(Fake(L, 2, 32, dtype="uint8", device=(CUDA, 1)))),
            "table: expected a tensor on cuda:0, got cuda:1",
        ),
        (
            dict(table=table(Fake(L, 32, dtype="uint8"))),
            "table: expected shape [2, 2, 32], got shape [2, 32]",
        ),
    ],
)
def test_forward_on_a_table_refuses(change: dict[str, Any], message: str) -> None:
    call = arguments() | dict(a=None, b=None, table=table())
    with pytest.raises(ValueError, match=says(message)):
        moe_lora.forward(**(call | change))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(dtype="float32"), "dtype: expected bfloat16 or float16, got float32"),
        (dict(slots=0), "slots is 0, expected at least 1"),
        (dict(out_dims=[]), "slices is 0, expected at least 1"),
        (dict(out_dims=[8] * 5), "slices is 5, expected at most 4"),
        (dict(max_rank=2000), "max_rank is 2000, expected at most 1024"),
    ],
)
def test_a_table_refuses_sizes(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=says(message)):
        table(**change)


def split(**change: Any) -> dict[str, Any]:
    """Arguments of shrink."""
    call = {
        name: value for name, value in arguments().items() if name in ("x", "a", "topk_ids", "token_lora")
    }
    return call | dict(h=Fake(2, T, K_TOP, R)) | change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(h=Fake(2, R)), "h: expected shape [S, T, k, R] or [S, P, R], got shape [2, 8]"),
        (dict(h=Fake(2, 11, R)), "h: expected shape [S, 12, R], got shape [2, 11, 8]"),
        (dict(h=Fake(1, T, K_TOP, R)), "h: expected shape [2, 6, 2, 8], got shape [1, 6, 2, 8]"),
        (dict(h=Fake(2, T, K_TOP, 4)), "h: expected shape [2, 6, 2, 8], got shape [2, 6, 2, 4]"),
        (dict(h=Fake(2, T, K_TOP, R, dtype="float32")), "h: expected bfloat16, got float32"),
        (
            dict(h=Fake(2, 12, R), topk_ids=None, token_lora=None),
            "h: expected shape [S, T, k, R], as there is no topk_ids to tell T from k, got shape [2, 12, 8]",
        ),
    ],
)
def test_shrink_refuses(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=says(message)):
        moe_lora.shrink(**split(**change))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(h=Fake(2, 11, R)), "h: expected shape [S, 6, 2, R] or [S, 12, R], got shape [2, 11, 8]"),
        (dict(h=Fake(2, T, K_TOP, R, dtype="float32")), "h: expected bfloat16 or float16, got float32"),
        (dict(b=weights(L, E, N, 4)), "h: expected shape [2, 6, 2, 4], got shape [2, 6, 2, 8]"),
    ],
)
def test_expand_refuses(change: dict[str, Any], message: str) -> None:
    call = {name: value for name, value in arguments().items() if name not in ("x", "a")}
    with pytest.raises(ValueError, match=says(message)):
        moe_lora.expand(**(call | dict(h=Fake(2, T, K_TOP, R)) | change))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(topk_ids=Fake(T, **I32)), "topk_ids: expected shape [T, k], got shape [6]"),
        (dict(token_lora=Fake(T, 1, **I32)), "token_lora: expected shape [≥ 6], got shape [6, 1]"),
        (dict(topk_ids=None, token_lora=None), "token_lora: expected a tensor, got None"),
        (
            dict(token_lora=None),
            "topk_ids: expected with token_lora, or without it for the route that the workspace keeps",
        ),
        (dict(tokens=5), "tokens: expected 6 as topk_ids has, got 5"),
        (dict(topk_ids=None, tokens=7, experts=1), "token_lora: expected shape [≥ 7], got shape [6]"),
        (
            dict(topk_ids=None),
            "topk_ids: expected shape [6, 1], got None: only a dense layer has none, with E = 1 and k = 1, "
            "and this one has E = 4 and k = 1",
        ),
        (dict(experts=0), "experts is 0, expected at least 1"),
        (dict(max_rank=4096), "max_rank is 4096, expected at most 1024"),
    ],
)
def test_route_refuses(change: dict[str, Any], message: str) -> None:
    call = dict(topk_ids=Fake(T, K_TOP, **I32), token_lora=Fake(T, **I32), experts=E, slots=L, max_rank=R)
    with pytest.raises(ValueError, match=says(message)):
        moe_lora.route(**(call | change))


def test_workspace_refuses() -> None:
    with pytest.raises(ValueError, match=says("top_k is 65, expected at most 64")):
        moe_lora.Workspace(16, top_k=65, experts=E, slots=L, max_rank=R)


def test_the_per_thread_stream_needs_a_workspace() -> None:
    """One address stands for the streams of all threads, so it says nothing of whose workspace to use."""
    message = "workspace: expected one, as the call runs on the per-thread default stream"
    with pytest.raises(ValueError, match=message):
        moe_lora.forward(**(arguments() | dict(stream=2)))


def test_types_of_plain_arguments() -> None:
    with pytest.raises(TypeError, match="mul_routed_weight"):
        moe_lora.forward(**(arguments() | dict(mul_routed_weight=1)))
    with pytest.raises(OverflowError):
        moe_lora.forward(**(arguments() | dict(offset=-1)))


def test_a_call_with_nothing_wrong_needs_a_device() -> None:
    """The arguments that the refusals start from are right: without a driver, that is what is missed."""
    try:
        import ctypes

        ctypes.CDLL("libcuda.so.1")
    except OSError:
        for call in (
            arguments(),
            dense(),
            dense(topk_ids=None, token_lora=None),
            arguments() | dict(a=None, b=None, table=table()),
            arguments() | dict(topk_ids=Fake(T, K_TOP, dtype="int64"), token_lora=Fake(9, **I32)),
            arguments() | dict(a=weights(L, E, R, K, strides=SHARED_A), order="interleaved"),
            arguments() | dict(x_index=Fake(12, **I32), x=Fake(3, K), out_index=Fake(T, K_TOP, **I32)),
        ):
            with pytest.raises(RuntimeError, match="no CUDA device: no CUDA driver"):
                moe_lora.forward(**call)
    else:
        pytest.skip("there is a CUDA driver, and these tensors are not there")
