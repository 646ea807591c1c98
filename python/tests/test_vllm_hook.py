"""vLLM's wrapper with these kernels, in a real vLLM on a GPU, against PyTorch."""

from __future__ import annotations

import importlib.util
from types import SimpleNamespace
from typing import Any

import pytest

torch = pytest.importorskip("torch", reason="PyTorch is not installed")
if importlib.util.find_spec("vllm") is None:
    pytest.skip("vLLM is not installed", allow_module_level=True)

from moe_lora import _native  # noqa: E402
from moe_lora.vllm import fallback, operators, ranks, workspaces  # noqa: E402
from reference import TOLERANCE, Case, check  # noqa: E402

pytestmark = pytest.mark.gpu

MOST_TOKENS = 256


def wrapper(case: Case) -> Any:
    """A wrapper that has been told of the batch."""
    from moe_lora.vllm.punica import MoeLoraPunicaWrapper

    config = SimpleNamespace(
        max_loras=case.slots, max_lora_rank=case.rank, specialize_active_lora=False, fully_sharded_loras=False
    )
    made = MoeLoraPunicaWrapper(MOST_TOKENS, 64, torch.device("cuda:0"), lora_config=config)
    # What a batch leaves behind its own tokens is memory that nobody wrote.
    made.token_mapping_meta.token_lora_mapping.fill_(12345)
    made.token_mapping_meta.prepare_tensors(case.token_lora.long())
    return made


@pytest.fixture(autouse=True)
def fresh(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fallback, "_WARNED", set())
    monkeypatch.setattr(fallback, "THEIRS", {})


def w13(made: Any, case: Case, y: Any, **change: Any) -> Any:
    """Its arguments as vLLM's layers pass them."""
    w1 = torch.empty(case.experts, 2 * case.out_dim, case.in_dim, device="meta")
    w2 = torch.empty(case.experts, case.in_dim, case.out_dim, device="meta")
    given = {
        "topk_ids": case.topk_ids,
        "expert_map": None,
        "lora_a": tuple(case.a),
        "lora_b": tuple(case.b),
        "enabled": torch.ones(case.slots + 1, dtype=torch.int32, device="cuda"),
        "fully_sharded": False,
        "add_inputs": True,
        "mapping": None,
        **change,
    }
    return made.add_lora_w13(
        y, case.x, given["lora_a"], given["lora_b"], given["topk_ids"], case.topk_weights,
        given["expert_map"], w1, w2, case.tokens, case.top_k, case.slots, given["enabled"], case.experts,
        case.top_k, case.slices, given["fully_sharded"], False, add_inputs=given["add_inputs"],
        token_lora_mapping=given["mapping"],
    )  # fmt: skip


def w2(made: Any, case: Case, y: Any, handed: Any, **change: Any) -> None:
    w1 = torch.empty(case.experts, 2 * case.in_dim, case.out_dim, device="meta")
    down = torch.empty(case.experts, case.out_dim, case.in_dim, device="meta")
    enabled = change.pop("enabled", torch.ones(case.slots + 1, dtype=torch.int32, device="cuda"))
    made.add_lora_w2(
        y, case.x, tuple(case.a), tuple(case.b), case.topk_weights, *handed, case.tokens, w1, down,
        case.top_k, case.slots, enabled, case.top_k, False, 0, False, **change,
    )  # fmt: skip


def down(case: Case) -> Case:
    """w2 of the same layer, tokens and ids."""
    made = Case(
        case.tokens, top_k=case.top_k, experts=case.experts, slots=case.slots, rank=case.rank, slices=1,
        in_dim=96, out_dim=128, dtype=case.dtype, x_rows="pair", seed=case.seed + 1,
    )  # fmt: skip
    made.topk_ids, made.topk_weights, made.token_lora = case.topk_ids, case.topk_weights, case.token_lora
    return made


@pytest.mark.parametrize("tokens", [1, 7, 40, 200])
@pytest.mark.parametrize("add_inputs", [True, False])
@pytest.mark.parametrize("ids", [torch.int32, torch.int64])
def test_a_layer(tokens: int, add_inputs: bool, ids: Any) -> None:
    case = Case(tokens)
    made = wrapper(case)
    first = case.base.clone()
    handed = w13(made, case, first, topk_ids=case.topk_ids.to(ids), add_inputs=add_inputs)
    check(first, case.delta() + (case.base.float() if add_inputs else 0))
    second = down(case)
    y = second.base.clone()
    w2(made, second, y, handed, add_inputs=add_inputs)
    check(y, second.delta(mul_routed_weight=True) + (second.base.float() if add_inputs else 0))
    assert not fallback._WARNED


def test_a_route_that_another_call_has_replaced_is_made_again() -> None:
    case, other = Case(40), Case(40, seed=9)
    made = wrapper(case)
    handed = w13(made, case, case.base.clone())
    # Another layer's call between the two, on other ids.
    w13(made, other, other.base.clone())
    second = down(case)
    y = second.base.clone()
    w2(made, second, y, handed)
    check(y, second.base.float() + second.delta(mul_routed_weight=True))


def test_experts_on_other_devices() -> None:
    case = Case(40, experts=8)
    # Of 16 experts this device has every other one.
    expert_map = torch.full((16,), -1, dtype=torch.int32, device="cuda")
    expert_map[::2] = torch.arange(8, dtype=torch.int32, device="cuda")
    case.topk_ids = torch.rand(40, 16).argsort(dim=1)[:, :8].to(torch.int32).cuda()
    made = wrapper(case)
    out = case.base.clone()
    handed = w13(made, case, out, expert_map=expert_map)
    check(out, case.base.float() + case.delta(expert_map=expert_map))
    second = down(case)
    y = second.base.clone()
    w2(made, second, y, handed)
    check(y, second.base.float() + second.delta(mul_routed_weight=True, expert_map=expert_map))


def test_a_mapping_of_its_own_and_a_slot_that_is_off() -> None:
    """As after a dispatch: the mapping comes with the call, and may be longer than T."""
    case = Case(40)
    made = wrapper(case)
    enabled = torch.tensor([1, 0, 1, 1], dtype=torch.int32, device="cuda")
    longer = torch.cat([case.token_lora, torch.full((24,), 99, dtype=torch.int32, device="cuda")])
    made.token_mapping_meta.token_lora_mapping.fill_(-1)
    out = case.base.clone()
    w13(made, case, out, mapping=longer, enabled=enabled)
    check(out, case.base.float() + case.delta(adapter_enabled=enabled))


def test_a_shared_factor_is_a_view_of_stride_0() -> None:
    case = Case(40, shared_a=True)
    made = wrapper(case)
    views = tuple(a.expand(-1, case.experts, -1, -1) for a in case.a)
    out = case.base.clone()
    w13(made, case, out, lora_a=views)
    check(out, case.base.float() + case.delta())
    assert not fallback._WARNED


def test_no_token_has_an_adapter() -> None:
    case = Case(40, without_adapter=1.0)
    made = wrapper(case)
    out, second = case.base.clone(), down(case)
    handed, y = w13(made, case, out), second.base.clone()
    w2(made, second, y, handed)
    assert torch.equal(out, case.base) and torch.equal(y, second.base)


def test_ranks_as_they_are() -> None:
    case = Case(40, rank=32)
    layer = SimpleNamespace(
        w13_lora_a_stacked=tuple(case.a),
        w2_lora_a_stacked=(case.a[0],),
        fully_sharded=False,
        set_lora=lambda index, lora_a, lora_b: None,
        reset_lora=lambda index: None,
    )
    ranks.follow(layer)
    own = torch.tensor([8, 0, 20], dtype=torch.int32, device="cuda")
    for slot, rank in enumerate(own.tolist()):
        # Ranks above the adapter's hold what must not be read.
        for s in range(2):
            case.b[s][slot, :, :, rank:] = float("nan")
        if rank:
            layer.set_lora(slot, [torch.zeros(16, rank, 1)] * 3, None)
    made, out = wrapper(case), case.base.clone()
    w13(made, case, out)
    check(out, case.base.float() + case.delta(ranks=own))


def refuse_once(monkeypatch: pytest.MonkeyPatch, at: int) -> None:
    """The call of this number is refused."""
    theirs, calls = _native.forward, [0]

    def forward(*args: Any, **kwargs: Any) -> None:
        calls[0] += 1
        if calls[0] == at:
            raise ValueError("x: expected something else")
        theirs(*args, **kwargs)

    for module in ("moe_lora.vllm.punica", "moe_lora.vllm.linear"):
        monkeypatch.setattr(f"{module}._native.forward", forward)


@pytest.mark.parametrize("at", [1, 2])
def test_what_is_refused_is_done_by_vllm(monkeypatch: pytest.MonkeyPatch, at: int) -> None:
    case = Case(40, in_dim=256, out_dim=128, rank=16)
    second = down(case)
    second.x = torch.randn(320, 96, device="cuda").to(case.dtype)
    made = wrapper(case)
    out, y = case.base.clone(), second.base.clone()
    refuse_once(monkeypatch, at)
    handed = w13(made, case, out)
    w2(made, second, y, handed)
    loose = 4 * TOLERANCE[case.dtype]
    for got, expected in [
        (out, case.base.float() + case.delta()),
        (y, second.base.float() + second.delta(mul_routed_weight=True)),
    ]:
        assert float((got.float() - expected).norm() / expected.norm()) <= loose
    assert len(fallback._WARNED) == 1


def linear_case(tokens: int, widths: list[int]) -> tuple[Case, list[Any], list[Any], Any]:
    case = Case(tokens, top_k=1, experts=1, slices=1, in_dim=128, rank=16)
    a = [torch.randn(3, 1, 16, 128, device="cuda").mul(0.1).to(case.dtype) for _ in widths]
    b = [torch.randn(3, 1, width, 16, device="cuda").mul(0.2).to(case.dtype) for width in widths]
    y = torch.randn(tokens, sum(widths), device="cuda").to(case.dtype)
    return case, a, b, y


def linear_delta(case: Case, a: list[Any], b: list[Any]) -> Any:
    parts = []
    for first, second in zip(a, b, strict=True):
        rows = [
            torch.zeros(second.shape[2], device="cuda")
            if slot < 0
            else second[slot, 0].float() @ (first[slot, 0].float() @ x)
            for slot, x in zip(case.token_lora.tolist(), case.x.float(), strict=True)
        ]
        parts.append(torch.stack(rows))
    return torch.cat(parts, dim=1)


@pytest.mark.parametrize("tokens", [1, 40, 200])
@pytest.mark.parametrize("widths", [[96], [128, 32, 32], [64, 64], [48, 16, 32, 64, 80]])
@pytest.mark.parametrize("add_inputs", [True, False])
@pytest.mark.parametrize("refused", [False, True])
def test_linear_layers(
    monkeypatch: pytest.MonkeyPatch, tokens: int, widths: list[int], add_inputs: bool, refused: bool
) -> None:
    case, a, b, y = linear_case(tokens, widths)
    made = wrapper(case)
    expected = linear_delta(case, a, b) + (y.float() if add_inputs else 0)
    if not add_inputs:
        y.zero_()
    if refused:
        refuse_once(monkeypatch, 1)
    made.add_lora_linear(y, case.x, tuple(a), tuple(b), 1.0, tuple(widths), add_inputs=add_inputs)
    error = float((y.float() - expected).norm() / expected.norm())
    assert error <= (4 if refused else 1) * TOLERANCE[case.dtype]
    active = bool((case.token_lora >= 0).any())
    assert bool(fallback._WARNED) == (refused and active)


def test_linear_layers_are_traced_as_one_operator() -> None:
    case, a, b, y = linear_case(40, [64, 32, 32])
    made = wrapper(case)
    expected = y.float() + linear_delta(case, a, b)

    def layer(y: Any, x: Any) -> Any:
        made.add_lora_linear(y, x, tuple(a), tuple(b), 1.0, (64, 32, 32))
        return y * 2

    twice = torch.compile(layer, fullgraph=True, dynamic=True)(y.clone(), case.x)
    check(twice / 2, expected)


def test_nothing_grows_after_a_step_of_the_most_tokens() -> None:
    """As vLLM's profiling run is one."""
    case = Case(MOST_TOKENS)
    linear, a, b, y = linear_case(MOST_TOKENS, [64, 32, 32])
    made = wrapper(case)
    before = workspaces.nbytes()
    out = case.base.clone()
    w2(made, down(case), down(case).base.clone(), w13(made, case, out))
    made.add_lora_linear(y, linear.x, tuple(a), tuple(b), 1.0, (64, 32, 32))
    profiled = workspaces.nbytes()
    assert profiled >= before
    for tokens in [1, 3, 17, 64, 200, MOST_TOKENS]:
        case = Case(tokens)
        linear, a, b, y = linear_case(tokens, [96])
        made = wrapper(case)
        w2(made, down(case), down(case).base.clone(), w13(made, case, case.base.clone()))
        made.add_lora_linear(y, linear.x, tuple(a), tuple(b), 1.0, (96,))
        assert workspaces.nbytes() == profiled


def test_a_captured_layer_follows_its_inputs() -> None:
    case = Case(40)
    made, second = wrapper(case), down(case)
    out, y = case.base.clone(), second.base.clone()

    def layer() -> None:
        w2(made, second, y, w13(made, case, out))

    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        layer()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        layer()
    case.route(7)
    made.token_mapping_meta.token_lora_mapping[:40].copy_(case.token_lora)
    out.copy_(case.base)
    y.copy_(second.base)
    graph.replay()
    check(out, case.base.float() + case.delta())
    check(y, second.base.float() + second.delta(mul_routed_weight=True))


def test_operators_fall_back_too(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[str] = []
    fallback.THEIRS["fused_moe_lora"] = lambda *args, **kwargs: seen.append("theirs")
    operators.fused_moe_lora(
        *[torch.zeros(1)] * 2, [torch.zeros(1, 1, 1, 1)], [torch.zeros(1, 1, 1, 1)], torch.zeros(1, 1), None,
        *[torch.zeros(1, dtype=torch.int32), None, torch.zeros(1, dtype=torch.int32), 1, 1],
        *[torch.zeros(1, dtype=torch.int32)] * 3, *[16] * 14,
    )  # fmt: skip
    assert seen == ["theirs"]
