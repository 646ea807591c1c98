"""The stand-in for vLLM's operators on a GPU, against PyTorch and against vLLM's own kernels."""

from __future__ import annotations

import sys
from types import ModuleType
from typing import Any

import pytest

torch = pytest.importorskip("torch", reason="PyTorch is not installed")

import moe_lora  # noqa: E402
import moe_lora.vllm as stand_in  # noqa: E402
import vllm_files  # noqa: E402
from reference import TOLERANCE, Case, blocks, check  # noqa: E402

pytestmark = pytest.mark.gpu

BLOCK_SIZE = 16
# BLOCK_SIZE_M, _N, _K, GROUP_SIZE_M, warps, stages, SPLIT_K; once for shrink, once for expand.
CONFIG = [BLOCK_SIZE, 32, 64, 1, 4, 3, 1] * 2
NO_ADAPTER = 1.0


def max_padded(case: Case, block_size: int = BLOCK_SIZE) -> int:
    return case.tokens * case.top_k + case.experts * (block_size - 1)


def lora_ids(case: Case) -> tuple[torch.Tensor, torch.Tensor]:
    """Which adapters a batch uses, as vLLM lists them: sorted, -1 (none) among them; and how many there
    are."""
    active = torch.unique(case.token_lora)
    ids = torch.full((case.slots + 1,), -1, dtype=torch.int32, device="cuda")
    ids[: len(active)] = active
    return ids, torch.tensor([len(active)], dtype=torch.int32)


def routing(case: Case, form: str) -> list[Any]:
    """sorted_token_ids, expert_ids, num_tokens_post_padded."""
    if form == "naive":
        return [None, case.topk_ids.reshape(-1), None]
    return list(blocks(case, BLOCK_SIZE, max_padded(case)))


def call(
    operator: Any,
    case: Case,
    out: torch.Tensor,
    form: str,
    enabled: torch.Tensor | None = None,
    mul_routed_weight: bool = False,
    add_inputs: bool = True,
    offset: int = 0,
    arrays: list[Any] | None = None,
) -> None:
    if enabled is None:
        enabled = torch.ones(case.slots + 1, dtype=torch.int32, device="cuda")
    ids, active = lora_ids(case)
    operator(
        out, case.x, case.a, case.b, case.topk_weights, *(arrays or routing(case, form)), case.token_lora,
        case.rank,
        case.top_k, ids, active, enabled, *CONFIG, mul_routed_weight, False, offset, add_inputs,
    )  # fmt: skip


@pytest.mark.parametrize("form", ["sorted", "naive"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("rank", [16, 32, 64])
@pytest.mark.parametrize("slots", [4, 6, 16])
@pytest.mark.parametrize("top_k", [6, 12])
def test_vllms_grid(top_k: int, slots: int, rank: int, dtype: torch.dtype, form: str) -> None:
    """The sizes of vLLM's own tests."""
    case = Case(
        100, top_k=top_k, experts=64, slots=slots, rank=rank, slices=1, in_dim=2048, out_dim=1408,
        dtype=dtype,
        without_adapter=0,
    )  # fmt: skip
    out = torch.zeros_like(case.base)
    call(stand_in.fused_moe_lora, case, out, form)
    check(out, case.delta())


@pytest.mark.parametrize("form", ["sorted", "naive"])
@pytest.mark.parametrize("add_inputs", [True, False])
@pytest.mark.parametrize("mul_routed_weight", [False, True])
@pytest.mark.parametrize("rank", [4, 8, 128, 256])
def test_ranks_and_modes(rank: int, mul_routed_weight: bool, add_inputs: bool, form: str) -> None:
    case = Case(
        40, rank=rank, x_rows="pair" if mul_routed_weight else "token", slices=1 + (not mul_routed_weight)
    )
    out = case.base.clone()
    call(stand_in.fused_moe_lora, case, out, form, mul_routed_weight=mul_routed_weight, add_inputs=add_inputs)
    expected = case.delta(mul_routed_weight=mul_routed_weight)
    active = case.active()
    check(out[active], expected[active] + (case.base[active].float() if add_inputs else 0))
    assert torch.equal(out[~active], case.base[~active])


@pytest.mark.parametrize("form", ["sorted", "naive"])
@pytest.mark.parametrize("why", ["no token has an adapter", "every adapter is off"])
def test_nothing_active_leaves_the_residual_alone(why: str, form: str) -> None:
    case = Case(40, without_adapter=NO_ADAPTER if why.startswith("no") else 0)
    on = torch.full((case.slots + 1,), why.startswith("no"), dtype=torch.int32, device="cuda")
    out = case.base.clone()
    call(stand_in.fused_moe_lora, case, out, form, enabled=on)
    assert torch.equal(out, case.base)


@pytest.mark.parametrize("form", ["sorted", "naive"])
def test_a_slot_that_is_off(form: str) -> None:
    case = Case(40)
    on = torch.tensor([1, 0, 1, 1], dtype=torch.int32, device="cuda")
    out = case.base.clone()
    call(stand_in.fused_moe_lora, case, out, form, enabled=on)
    check(out, case.base.float() + case.delta(adapter_enabled=on))


@pytest.mark.parametrize("form", ["sorted", "naive"])
def test_no_tokens(form: str) -> None:
    case = Case(0)
    call(stand_in.fused_moe_lora, case, case.base, form)


@pytest.mark.parametrize("form", ["sorted", "naive"])
def test_views_and_offset(form: str) -> None:
    """Rows of the output further apart than they are wide, and columns before the first: nothing else is
    written."""
    case = Case(40, slices=1)
    whole = torch.full((case.tokens, case.top_k, case.out_dim + 40), 7.0, dtype=case.dtype, device="cuda")
    call(stand_in.fused_moe_lora, case, whole[:, :, : case.out_dim + 32], form, offset=16)
    middle = slice(16, 16 + case.out_dim)
    check(whole[:, :, middle], case.delta() + 7)
    whole[:, :, middle] = 7
    assert (whole == 7).all()


@pytest.mark.parametrize("form", ["sorted", "naive"])
def test_longer_token_mapping_and_64_bit_ids(form: str) -> None:
    case = Case(40)
    arrays = routing(case, form)
    if form == "naive":
        arrays[1] = arrays[1].long()
    expected = case.base.float() + case.delta()
    out = case.base.clone()
    longer = torch.cat([case.token_lora, torch.zeros(24, dtype=torch.int32, device="cuda")])
    case.token_lora, mapping = longer, case.token_lora
    ids, active = torch.arange(-1, 3, dtype=torch.int32, device="cuda"), torch.tensor([4], dtype=torch.int32)
    on = torch.ones(4, dtype=torch.int32, device="cuda")
    stand_in.fused_moe_lora(
        out, case.x, case.a, case.b, case.topk_weights, *arrays, case.token_lora, 16, 8, ids, active, on,
        *CONFIG,
    )  # fmt: skip
    case.token_lora = mapping
    check(out, expected)


@pytest.mark.parametrize("form", ["sorted", "naive"])
@pytest.mark.parametrize("add_inputs", [True, False])
@pytest.mark.parametrize("fully_sharded", [False, True])
@pytest.mark.parametrize("expanded", [False, True])
def test_a_shared_a(
    monkeypatch: pytest.MonkeyPatch, expanded: bool, fully_sharded: bool, add_inputs: bool, form: str
) -> None:
    """One matrix for all experts: of size 1, or of a stride of 0."""
    case = Case(40, shared_a=True)
    expected = case.delta()
    if expanded:
        case.a = [a.expand(-1, case.experts, -1, -1) for a in case.a]
    ids, active = lora_ids(case)
    on = torch.ones(case.slots + 1, dtype=torch.int32, device="cuda")
    distributed = ModuleType("vllm.distributed")
    distributed.tensor_model_parallel_all_reduce = lambda h: h
    distributed.tensor_model_parallel_all_gather = None
    monkeypatch.setitem(sys.modules, "vllm", ModuleType("vllm"))
    monkeypatch.setitem(sys.modules, "vllm.distributed", distributed)
    out = case.base.clone()
    stand_in.fused_moe_lora(
        out, case.x, case.a, case.b, case.topk_weights, *routing(case, form), case.token_lora, case.rank,
        case.top_k, ids, active, on,
        *CONFIG, False, fully_sharded, 0, add_inputs,
    )  # fmt: skip
    on_tokens = case.active()
    base = case.base.float() if add_inputs else torch.zeros_like(expected)
    error = (out.float() - base - expected)[on_tokens].norm() / expected.norm()
    # Apart, h is rounded once more.
    assert error <= 2 * TOLERANCE[case.dtype]
    assert torch.equal(out[~on_tokens], case.base[~on_tokens])


@pytest.mark.parametrize("form", ["sorted", "naive"])
def test_split_form(form: str) -> None:
    case = Case(40)
    ids, active = lora_ids(case)
    on = torch.ones(case.slots + 1, dtype=torch.int32, device="cuda")
    shared = [case.topk_weights, *routing(case, form), case.token_lora, case.top_k, ids, on, case.x.device]
    sizes = [case.rank, case.tokens, 0, case.in_dim, case.tokens * case.top_k, case.experts, case.slices]
    h = torch.zeros(2, 40, 8, 16, dtype=case.dtype, device="cuda")
    stand_in.fused_moe_lora_shrink(h, case.x, case.a, *shared, *sizes, *CONFIG[:7], active)
    out = case.base.clone()
    stand_in.fused_moe_lora_expand(
        out,
        h,
        case.b,
        *shared,
        *sizes,
        case.rank,
        case.out_dim,
        *CONFIG[7:],
        active,
        offset=0,
        add_inputs=True,
    )
    check(out, case.base.float() + case.delta())


@pytest.mark.parametrize("form", ["sorted", "naive"])
@pytest.mark.parametrize("collective", ["all_reduce", "all_gather"])
def test_fully_sharded(monkeypatch: pytest.MonkeyPatch, collective: str, form: str) -> None:
    """One device of two, the other's part being known: w2 sums h over devices, w13 joins the ranks of its
    shards."""
    case = Case(40, rank=32)
    ids, active = lora_ids(case)
    on = torch.ones(case.slots + 1, dtype=torch.int32, device="cuda")
    expected = case.base.float() + case.delta()
    arrays = routing(case, form)
    if collective == "all_gather":
        shards = [[a[:, :, half : half + 16].contiguous() for a in case.a] for half in (0, 16)]
    else:
        shards = [[a * share for a in case.a] for share in (0.25, 0.75)]
    rank = shards[0][0].shape[2]
    other = torch.zeros(2, 40, 8, rank, dtype=case.dtype, device="cuda")
    moe_lora.shrink(case.x, shards[1], case.topk_ids, case.token_lora, other)
    distributed = ModuleType("vllm.distributed")
    distributed.tensor_model_parallel_all_reduce = lambda h: h + other
    distributed.tensor_model_parallel_all_gather = lambda h: torch.cat([h, other], dim=-1)
    monkeypatch.setitem(sys.modules, "vllm", ModuleType("vllm"))
    monkeypatch.setitem(sys.modules, "vllm.distributed", distributed)
    out = case.base.clone()
    stand_in.fused_moe_lora(
        out, case.x, shards[0], case.b, case.topk_weights, *arrays, case.token_lora, rank, case.top_k, ids,
        active, on,
        *CONFIG, False, True, 0, True,
    )  # fmt: skip
    # h is rounded once more, and summed in the element type.
    error = (out.float() - expected).norm() / expected.norm()
    assert error <= 2 * TOLERANCE[case.dtype]


def aligned(case: Case, block_size: int, **more: Any) -> list[torch.Tensor]:
    """What this package's routing step leaves."""
    padded = max_padded(case, block_size)
    out = [
        torch.full((case.slots * size,), -7, dtype=torch.int32, device="cuda")
        for size in (padded, -(-padded // block_size), 1)
    ]
    ids, _ = lora_ids(case)
    on = torch.ones(case.slots + 1, dtype=torch.int32, device="cuda")
    stand_in.moe_lora_align_block_size(
        case.topk_ids, case.token_lora, case.experts, block_size, case.slots, padded,
        -(-padded // block_size), *out,
        on, ids, **more,
    )  # fmt: skip
    return [tensor.view(case.slots, -1) for tensor in out[:2]] + [out[2]]


@pytest.mark.parametrize("tokens", [1, 33, 500, 4000])
@pytest.mark.parametrize("block_size", [16, 64, 128])
@pytest.mark.parametrize("ids", [torch.int32, torch.int64])
def test_align(ids: torch.dtype, block_size: int, tokens: int) -> None:
    case = Case(tokens, experts=64, slots=4, in_dim=8, out_dim=8)
    expected = blocks(case, block_size, max_padded(case, block_size))
    case.topk_ids = case.topk_ids.to(ids)
    got = aligned(case, block_size)
    used = torch.unique(case.token_lora[case.token_lora >= 0]).long()
    assert torch.equal(got[2][used], expected[2][used])
    assert torch.equal(got[1][used], expected[1][used])
    # The order of pairs within an expert is nobody's promise.
    for slot in used.tolist():
        ends = [0, *range(block_size, got[0].shape[1], block_size)]
        experts = got[1][slot]
        for expert in torch.unique(experts[experts >= 0]).tolist():
            rows = torch.nonzero(experts == expert).reshape(-1).tolist()
            places = slice(ends[rows[0]], ends[rows[-1]] + block_size)
            assert torch.equal(got[0][slot, places].sort().values, expected[0][slot, places].sort().values)


def test_align_then_the_operator() -> None:
    """A layer as vLLM runs it: one routing step, then w13 and w2 on its arrays."""
    w13 = Case(300, slots=4, seed=9)
    w2 = Case(300, slots=4, seed=9, slices=1, x_rows="pair", in_dim=96, out_dim=128)
    arrays = aligned(w13, BLOCK_SIZE)
    for case in (w13, w2):
        out = case.base.clone()
        call(stand_in.fused_moe_lora, case, out, "sorted", mul_routed_weight=case is w2, arrays=arrays)
        check(out, case.base.float() + case.delta(mul_routed_weight=case is w2))


@pytest.mark.parametrize("form", ["sorted", "naive"])
def test_a_captured_graph_follows_the_routing_tensors(form: str) -> None:
    case = Case(50, slots=4, without_adapter=0)
    out = case.base.clone()
    padded = max_padded(case)
    sizes = [case.slots * padded, case.slots * -(-padded // BLOCK_SIZE), case.slots]
    flat = [torch.zeros(size, dtype=torch.int32, device="cuda") for size in sizes]
    every = torch.arange(-1, 4, dtype=torch.int32, device="cuda")
    active, on = torch.tensor([5], dtype=torch.int32), torch.ones(5, dtype=torch.int32, device="cuda")

    def layer() -> None:
        arrays = [None, case.topk_ids.view(-1), None]
        if form == "sorted":
            stand_in.moe_lora_align_block_size(
                case.topk_ids, case.token_lora, case.experts, BLOCK_SIZE, case.slots, padded,
                -(-padded // BLOCK_SIZE),
                *flat, on, every,
            )  # fmt: skip
            arrays = [flat[0].view(4, -1), flat[1].view(4, -1), flat[2]]
        stand_in.fused_moe_lora(
            out, case.x, case.a, case.b, case.topk_weights, *arrays, case.token_lora, 16, 8, every, active,
            on, *CONFIG,
        )  # fmt: skip

    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=torch.cuda.Stream()):
        layer()
    for seed in (5, 6):
        case.route(seed)
        out.copy_(case.base)
        graph.replay()
        torch.cuda.synchronize()
        check(out, case.base.float() + case.delta())


@pytest.mark.parametrize("form", ["sorted", "naive"])
def test_torch_compile(form: str) -> None:
    case = Case(40)
    arrays = routing(case, form)
    ids, active = lora_ids(case)
    on = torch.ones(case.slots + 1, dtype=torch.int32, device="cuda")

    def layer(x: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
        out = out * 1
        stand_in.fused_moe_lora(
            out, x + 0, case.a, case.b, case.topk_weights, *arrays, case.token_lora, 16, 8, ids, active, on,
            *CONFIG,
        )  # fmt: skip
        return out + 1

    got = torch.compile(layer, fullgraph=True)(case.x, case.base)
    check(got, case.base.float() + case.delta() + 1)


@pytest.mark.parametrize("form", ["sorted", "naive"])
def test_the_operator_is_the_function(form: str) -> None:
    """Through PyTorch's dispatcher, as compiled code calls it."""
    case = Case(40)
    out, expected = case.base.clone(), case.base.clone()
    call(stand_in.fused_moe_lora, case, expected, form)
    call(torch.ops.moe_lora.fused_moe_lora, case, out, form)
    assert torch.equal(out, expected)


def test_operators_keep_their_promises() -> None:
    """PyTorch's own checks of a custom operator: its schema, its fake, tracing."""
    case = Case(10)
    ids, active = lora_ids(case)
    on = torch.ones(case.slots + 1, dtype=torch.int32, device="cuda")
    arguments = (
        case.base.clone(), case.x, case.a, case.b, case.topk_weights, *routing(case, "sorted"),
        case.token_lora, 16, 8,
        ids, active, on, *CONFIG,
    )  # fmt: skip
    torch.library.opcheck(torch.ops.moe_lora.fused_moe_lora.default, arguments)


def test_refusals_name_the_tensor() -> None:
    case = Case(10)
    before = case.base.clone()
    sorted_ids, expert_ids, padded = routing(case, "sorted")
    for message, form, arrays in [
        (
            r"sorted_token_ids: expected shape \[3, ≥ 1\], got shape \[2, ",
            "sorted",
            [sorted_ids[:2], expert_ids, padded],
        ),
        (r"expert_ids: expected int32, got int64", "sorted", [sorted_ids, expert_ids.long(), padded]),
        (r"num_tokens_post_padded: expected a tensor", "sorted", [sorted_ids, expert_ids, None]),
        (
            r"expert_ids: expected shape \[80\], got shape \[79\]",
            "naive",
            [None, case.topk_ids.reshape(-1)[1:], None],
        ),
    ]:
        with pytest.raises(ValueError, match=message):
            call(stand_in.fused_moe_lora, case, case.base, form, arrays=arrays)
    with pytest.raises(ValueError, match="x: expected a tensor on a CUDA device, got one on the CPU"):
        case.x = case.x.cpu()
        call(stand_in.fused_moe_lora, case, case.base, "sorted", arrays=[sorted_ids, expert_ids, padded])
    torch.cuda.synchronize()
    assert torch.equal(case.base, before)


@pytest.fixture(scope="module")
def theirs() -> ModuleType:
    """vLLM 0.33's operator."""
    file = vllm_files.path()
    if file is None:
        pytest.skip(f"{vllm_files.FOLDER_VAR} names no folder with vLLM's files")
    return vllm_files.load(file)


@pytest.mark.parametrize("form", ["sorted", "naive"])
@pytest.mark.parametrize("add_inputs", [True, False])
@pytest.mark.parametrize("rank", [8, 64, 256])
@pytest.mark.parametrize("tokens", [2, 40])
def test_agrees_with_vllm(theirs: ModuleType, tokens: int, rank: int, add_inputs: bool, form: str) -> None:
    """The same tensors through vLLM 0.33's own dispatch: small batches, one shot, and its two kernels for
    rank 256."""
    w13 = Case(tokens, rank=rank, slots=4, in_dim=256, out_dim=128)
    w2 = Case(tokens, rank=rank, slots=4, slices=1, x_rows="pair", in_dim=128, out_dim=256)
    for case in (w13, w2):
        ours_out, their_out = case.base.clone(), case.base.clone()
        for operator, out in [(stand_in.fused_moe_lora, ours_out), (theirs._fused_moe_lora, their_out)]:
            call(operator, case, out, form, mul_routed_weight=case is w2, add_inputs=add_inputs)
        active = case.active()
        difference = (ours_out[active].float() - their_out[active].float()).norm()
        scale = float(their_out[active].float().norm()) or 1.0
        # Each is within 3e-3 of the exact result.
        assert float(difference) / scale <= 6e-3
        assert torch.equal(ours_out[~active], their_out[~active])
