"""The operator on a GPU, against PyTorch."""

from __future__ import annotations

import pytest

torch = pytest.importorskip("torch", reason="PyTorch is not installed")

import moe_lora  # noqa: E402
from reference import Case, check  # noqa: E402

pytestmark = pytest.mark.gpu


def forward(case: Case, out: torch.Tensor, **more: object) -> None:
    moe_lora.forward(case.x, case.a, case.b, case.topk_ids, case.token_lora, out, **more)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("x_rows", ["token", "pair"])
@pytest.mark.parametrize("tokens", [1, 7, 80, 600])
def test_adds_to_out(tokens: int, x_rows: str, dtype: torch.dtype) -> None:
    case = Case(tokens, x_rows=x_rows, dtype=dtype)
    out = case.base.clone()
    forward(case, out, topk_weights=case.topk_weights, mul_routed_weight=True)
    check(out, case.base.float() + case.delta(mul_routed_weight=True))
    untouched = ~case.active()
    assert torch.equal(out[untouched], case.base[untouched])


@pytest.mark.parametrize("rank", [4, 8, 16, 64, 128, 256])
def test_overwrites_out(rank: int) -> None:
    case = Case(60, rank=rank)
    out = torch.full_like(case.base, float("nan"))
    forward(case, out, accumulate=False)
    check(out, case.delta())
    assert not out[~case.active()].any()


def test_odd_sizes() -> None:
    case = Case(33, top_k=3, experts=5, rank=5, slices=3, in_dim=77, out_dim=51)
    out = case.base.clone()
    forward(case, out)
    check(out, case.base.float() + case.delta())


def test_one_tensor_is_one_slice() -> None:
    case = Case(20, slices=1)
    out, listed = case.base.clone(), case.base.clone()
    moe_lora.forward(case.x, case.a[0], case.b[0], case.topk_ids, case.token_lora, out)
    forward(case, listed)
    assert torch.equal(out, listed)


@pytest.mark.parametrize("kind", [torch.int32, torch.uint8, torch.bool])
def test_switched_off_slots_ranks_and_expert_map(kind: torch.dtype) -> None:
    case = Case(90, slots=3)
    on = torch.tensor([1, 0, 1, 1], device="cuda").to(kind)
    ranks = torch.tensor([16, 16, 5], dtype=torch.int32, device="cuda")
    expert_map = torch.arange(-4, 12, dtype=torch.int32, device="cuda").clamp(min=-1)
    out = case.base.clone()
    forward(case, out, adapter_enabled=on, ranks=ranks, expert_map=expert_map)
    check(out, case.base.float() + case.delta(adapter_enabled=on, ranks=ranks, expert_map=expert_map))


def test_shared_a() -> None:
    case = Case(90, shared_a=True)
    out = case.base.clone()
    forward(case, out)
    check(out, case.base.float() + case.delta())


def test_views_with_gaps() -> None:
    """Rows of x and out further apart than they are wide, and an offset: nothing else is written."""
    case = Case(40, slices=1)
    wide_x = torch.zeros(case.tokens, case.in_dim + 24, dtype=case.dtype, device="cuda")
    wide_x[:, : case.in_dim] = case.x
    whole = torch.full((case.tokens, case.top_k, case.out_dim + 40), 7.0, dtype=case.dtype, device="cuda")
    view = whole[:, :, : case.out_dim + 32]
    moe_lora.forward(
        wide_x[:, : case.in_dim],
        case.a,
        case.b,
        case.topk_ids,
        case.token_lora,
        view,
        accumulate=False,
        offset=16,
    )
    check(whole[:, :, 16 : 16 + case.out_dim], case.delta())
    assert (whole[:, :, :16] == 7).all() and (whole[:, :, 16 + case.out_dim :] == 7).all()


def test_no_tokens() -> None:
    case = Case(0)
    forward(case, case.base)


def test_a_kept_route_serves_the_next_projection() -> None:
    w13, w2 = Case(70, seed=3), Case(70, seed=3, slices=1, x_rows="pair", in_dim=96, out_dim=128)
    first, second = w13.base.clone(), w2.base.clone()
    forward(w13, first)
    moe_lora.forward(
        w2.x, w2.a, w2.b, None, None, second, topk_weights=w2.topk_weights, mul_routed_weight=True
    )
    check(first, w13.base.float() + w13.delta())
    check(second, w2.base.float() + w2.delta(mul_routed_weight=True))


@pytest.mark.parametrize("own_workspace", [False, True])
def test_route_alone(own_workspace: bool) -> None:
    case = Case(70)
    workspace = None
    if own_workspace:
        workspace = moe_lora.Workspace(70, top_k=8, experts=16, slots=3, max_rank=16)
        assert workspace.nbytes > 0 and workspace.device == 0
    moe_lora.route(case.topk_ids, case.token_lora, experts=16, slots=3, max_rank=16, workspace=workspace)
    out = case.base.clone()
    moe_lora.forward(case.x, case.a, case.b, None, None, out, workspace=workspace)
    check(out, case.base.float() + case.delta())


def test_split_form() -> None:
    case = Case(70)
    h = torch.full((2, 70, 8, 16), float("nan"), dtype=case.dtype, device="cuda")
    moe_lora.shrink(case.x, case.a, case.topk_ids, case.token_lora, h)
    assert not h[:, ~case.active()].any()
    out = case.base.clone()
    moe_lora.expand(h, case.b, None, None, out)
    flat = case.base.clone()
    moe_lora.expand(h.view(2, -1, 16), case.b, case.topk_ids, case.token_lora, flat)
    check(out, case.base.float() + case.delta())
    assert torch.equal(out, flat)


def test_a_workspace_is_refused_when_it_is_too_small_or_keeps_no_route() -> None:
    case = Case(70)
    small = moe_lora.Workspace(8, top_k=8, experts=16, slots=3, max_rank=16)
    with pytest.raises(ValueError, match="workspace has room for"):
        forward(case, case.base, workspace=small)
    with pytest.raises(ValueError, match="route is not valid"):
        moe_lora.forward(case.x, case.a, case.b, None, None, case.base, workspace=small)


def test_runs_on_the_current_stream() -> None:
    """A call waits for what its stream queued before it, and for nothing else."""
    case = Case(80)
    expected = case.base.float() + case.delta()
    out = torch.empty_like(case.base)
    for explicit in (False, True):
        stream = torch.cuda.Stream()
        torch.cuda.synchronize()
        with torch.cuda.stream(stream):
            torch.cuda._sleep(20_000_000)
            out.copy_(case.base)
            if not explicit:
                forward(case, out)
        if explicit:
            forward(case, out, stream=stream)
        assert not stream.query(), "the call waited for the device"
        stream.synchronize()
        check(out, expected)


@pytest.mark.parametrize("own_workspace", [False, True])
def test_a_captured_graph_follows_the_routing_tensors(own_workspace: bool) -> None:
    """No warm-up: the first call on the capturing stream is captured."""
    case = Case(50, top_k=5)
    workspace = moe_lora.Workspace(50, top_k=5, experts=16, slots=3, max_rank=16) if own_workspace else None
    out = case.base.clone()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=torch.cuda.Stream()):
        forward(case, out, workspace=workspace)
        moe_lora.forward(case.x, case.a, case.b, None, None, out, workspace=workspace)
    # A larger call on any stream must leave what the graph uses alone.
    large = Case(3000, top_k=5)
    forward(large, large.base.clone())
    for seed in (5, 6):
        case.route(seed)
        out.copy_(case.base)
        graph.replay()
        torch.cuda.synchronize()
        check(out, case.base.float() + 2 * case.delta())


def test_the_same_call_gives_the_same_bits() -> None:
    case = Case(300)
    outs = [case.base.clone() for _ in range(3)]
    for out in outs:
        forward(case, out)
    assert torch.equal(outs[0], outs[1]) and torch.equal(outs[0], outs[2])


def test_parameters_and_inference_mode() -> None:
    case = Case(20)
    out, expected = case.base.clone(), case.base.clone()
    forward(case, expected)
    with torch.inference_mode():
        moe_lora.forward(
            case.x,
            [torch.nn.Parameter(a) for a in case.a],
            tuple(torch.nn.Parameter(b) for b in case.b),
            case.topk_ids,
            case.token_lora,
            out,
        )
    assert torch.equal(out, expected)


class OnlyDlpack:
    """A tensor of a library without C exchange functions."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self.tensor = tensor

    def __dlpack_device__(self) -> tuple[int, int]:
        return (2, self.tensor.device.index)

    def __dlpack__(self, *, stream: int | None = None) -> object:
        return torch.utils.dlpack.to_dlpack(self.tensor)


class OnlyCudaArray:
    """A tensor of a library that has the CUDA array interface alone."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self.__cuda_array_interface__ = tensor.__cuda_array_interface__


@pytest.mark.parametrize("wrap", [OnlyDlpack, OnlyCudaArray])
def test_tensors_of_other_libraries(wrap: type) -> None:
    case = Case(20, dtype=torch.float16, slices=1)
    out, expected = case.base.clone(), case.base.clone()
    forward(case, expected)
    arguments = [wrap(t) for t in (case.x, case.a[0], case.b[0], case.topk_ids, case.token_lora, out)]
    moe_lora.forward(*arguments)
    assert torch.equal(out, expected)


def test_refusals_write_nothing() -> None:
    case = Case(20)
    before = case.base.clone()
    faults = {
        "x": dict(x=case.x.cpu()),
        r"topk_ids: expected int32 or int64, got int16": dict(topk_ids=case.topk_ids.short()),
        r"topk_ids: expected shape \[20, 8\], got shape \[19, 8\]": dict(topk_ids=case.topk_ids[:19]),
        r"out: expected a contiguous innermost dimension": dict(
            out=case.base.transpose(1, 2).contiguous().transpose(1, 2)
        ),
        r"b\[1\]": dict(b=[case.b[0], case.b[1].float()]),
    }
    arguments = dict(
        x=case.x, a=case.a, b=case.b, topk_ids=case.topk_ids, token_lora=case.token_lora, out=case.base
    )
    for message, fault in faults.items():
        with pytest.raises(ValueError, match=message):
            moe_lora.forward(**(arguments | fault))
    torch.cuda.synchronize()
    assert torch.equal(case.base, before)
