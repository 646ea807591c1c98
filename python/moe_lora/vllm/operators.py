"""vLLM's fused MoE-LoRA operators, as functions and as operators of ``torch.library``.

Names, arguments and meaning are vLLM 0.33's (``vllm/lora/ops/triton_ops/fused_moe_lora_op.py`` and
``vllm/_custom_ops.py``). Two forms of routing, as in vLLM: *sorted*, three arrays that
``moe_lora_align_block_size`` has filled, and *naive*, with ``sorted_token_ids=None``, where ``expert_ids`` is
``topk_ids`` flattened and slots come from ``token_lora_mapping``. Arguments that tune vLLM's kernels
(``BLOCK_SIZE_*``, warps, stages, ``use_gdc``, ``use_tma``) are accepted and ignored, except ``BLOCK_SIZE_M``
in the sorted form, which says how the arrays were sorted.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch

from moe_lora import _native
from moe_lora.vllm import fallback


def ids_of(ids: torch.Tensor) -> torch.Tensor:
    """Ids as the kernels read them, of 32 bits, as vLLM's routers leave them, or of 64."""
    return ids if ids.dtype in (torch.int32, torch.int64) else ids.to(torch.int32)


def _experts(*factors: list[torch.Tensor]) -> int:
    """E. A factor that all experts share has one matrix, or as many with a stride of 0."""
    experts: int = max(factor[0].shape[1] for factor in factors)
    return experts


# Places of a block where this module sorts pairs itself: the smallest tile.
_BLOCK_SIZE = 16


def _sort(
    topk_ids: torch.Tensor, token_lora: torch.Tensor, adapter_enabled: torch.Tensor, slots: int, experts: int
) -> dict[str, Any]:
    """The naive form's pairs in blocks, which name active pairs alone."""
    pairs = topk_ids.numel()
    # Each segment begins a block of its own.
    segments = min(pairs, experts)
    blocks = segments + (pairs - segments) // _BLOCK_SIZE
    # vLLM's arrays are of 32 bits, whatever the ids are of.
    empty = functools.partial(topk_ids.new_empty, dtype=torch.int32)
    sorted_token_ids = empty((slots, blocks * _BLOCK_SIZE))
    expert_ids, padded = empty((slots, blocks)), empty(slots)
    every_slot = torch.arange(slots, dtype=torch.int32, device=topk_ids.device)
    _native.align(
        topk_ids,
        token_lora,
        experts,
        _BLOCK_SIZE,
        slots,
        blocks * _BLOCK_SIZE,
        blocks,
        sorted_token_ids,
        expert_ids,
        padded,
        adapter_enabled,
        every_slot,
    )
    arrays = (sorted_token_ids, expert_ids, padded, every_slot, slots, adapter_enabled, _BLOCK_SIZE)
    return {"topk_ids": None, "token_lora": None, "blocks": arrays}


def _routing(
    slots: int,
    experts: int,
    tokens: int,
    top_k: int,
    sorted_token_ids: torch.Tensor | None,
    expert_ids: torch.Tensor,
    num_tokens_post_padded: torch.Tensor | None,
    token_lora_mapping: torch.Tensor,
    lora_ids: torch.Tensor,
    num_active_loras: torch.Tensor,
    adapter_enabled: torch.Tensor,
    block_size: int,
    add_inputs: bool = True,
) -> dict[str, Any]:
    """Who goes where, as the extension module takes it."""
    if sorted_token_ids is not None:
        active = int(num_active_loras.item())
        arrays = (
            sorted_token_ids,
            expert_ids,
            num_tokens_post_padded,
            lora_ids,
            active,
            adapter_enabled,
            block_size,
        )
        return {"topk_ids": None, "token_lora": None, "blocks": arrays}
    if expert_ids.numel() != tokens * top_k:
        raise ValueError(f"expert_ids: expected shape [{tokens * top_k}], got shape {list(expert_ids.shape)}")
    topk_ids = ids_of(expert_ids).view(tokens, top_k)
    if not add_inputs and tokens > 0:
        # vLLM's kernels leave inactive pairs as they are when they overwrite, too; a route made of ids would
        # have them written as zeros.
        return _sort(topk_ids, token_lora_mapping, adapter_enabled, slots, experts)
    return {"topk_ids": topk_ids, "token_lora": token_lora_mapping, "adapter_enabled": adapter_enabled}


def _fused_moe_lora(
    output: torch.Tensor,
    qcurr_hidden_states: torch.Tensor,
    lora_a_stacked: list[torch.Tensor],
    lora_b_stacked: list[torch.Tensor],
    topk_weights: torch.Tensor,
    sorted_token_ids: torch.Tensor | None,
    expert_ids: torch.Tensor,
    num_tokens_post_padded: torch.Tensor | None,
    token_lora_mapping: torch.Tensor,
    max_lora_rank: int,
    top_k_num: int,
    lora_ids: torch.Tensor,
    num_active_loras: torch.Tensor,
    adapter_enabled: torch.Tensor,
    shrink_block_size_m: int,
    shrink_block_size_n: int,
    shrink_block_size_k: int,
    shrink_group_size_m: int,
    shrink_num_warps: int,
    shrink_num_stages: int,
    shrink_split_k: int,
    expand_block_size_m: int,
    expand_block_size_n: int,
    expand_block_size_k: int,
    expand_group_size_m: int,
    expand_num_warps: int,
    expand_num_stages: int,
    expand_split_k: int,
    mul_routed_weight: bool = False,
    fully_sharded: bool = False,
    offset: int = 0,
    add_inputs: bool = True,
) -> None:
    tokens, experts = topk_weights.shape[0], _experts(lora_a_stacked, lora_b_stacked)
    routing = _routing(
        lora_a_stacked[0].shape[0],
        experts,
        tokens,
        top_k_num,
        sorted_token_ids,
        expert_ids,
        num_tokens_post_padded,
        token_lora_mapping,
        lora_ids,
        num_active_loras,
        adapter_enabled,
        shrink_block_size_m,
        add_inputs,
    )
    delta: dict[str, Any] = {
        "topk_weights": topk_weights.float() if mul_routed_weight else None,
        "mul_routed_weight": mul_routed_weight,
        "accumulate": add_inputs,
        "offset": offset,
    }
    if fully_sharded:
        sizes = (tokens, top_k_num, experts)
        add_sharded(qcurr_hidden_states, lora_a_stacked, lora_b_stacked, output, sizes, routing, delta)
        return
    _native.forward(qcurr_hidden_states, lora_a_stacked, lora_b_stacked, out=output, **routing, **delta)


def add_sharded(
    x: torch.Tensor,
    a: list[torch.Tensor] | tuple[torch.Tensor, ...],
    b: list[torch.Tensor] | tuple[torch.Tensor, ...],
    out: torch.Tensor,
    sizes: tuple[int, int, int],
    routing: dict[str, Any],
    delta: dict[str, Any],
) -> None:
    """Adds the update of adapters that are divided among devices (``fully_sharded_loras``).

    Either ``a`` is divided by ranks, and h is gathered, or by columns, and h is summed. ``sizes``: T, k, E.
    """
    from vllm.distributed import tensor_model_parallel_all_gather, tensor_model_parallel_all_reduce

    tokens, top_k, experts = sizes
    # Zeros, since the sorted form names active pairs alone.
    h = x.new_zeros((len(a), tokens, top_k, a[0].shape[2]))
    _native.shrink(x, a, h=h, experts=experts, **routing)
    if b[0].shape[3] == a[0].shape[2]:
        h = tensor_model_parallel_all_reduce(h)
    else:
        h = tensor_model_parallel_all_gather(h)
    # The workspace's own route would be of the rank before the gather.
    _native.expand(h, b, out=out, experts=experts, **routing, **delta)


def _fused_moe_lora_shrink(
    a_intermediate_cache1: torch.Tensor,
    qcurr_hidden_states: torch.Tensor,
    lora_a_stacked: list[torch.Tensor],
    topk_weights: torch.Tensor,
    sorted_token_ids: torch.Tensor | None,
    expert_ids: torch.Tensor,
    num_tokens_post_padded: torch.Tensor | None,
    token_lora_mapping: torch.Tensor,
    top_k_num: int,
    lora_ids: torch.Tensor,
    adapter_enabled: torch.Tensor,
    device: torch.device,
    N: int,  # noqa: N803
    M: int,  # noqa: N803
    EM: int,  # noqa: N803
    K: int,  # noqa: N803
    num_tokens: int,
    num_experts: int,
    num_slices: int,
    block_size_m: int,
    block_size_n: int,
    block_size_k: int,
    group_size_m: int,
    num_warps: int,
    num_stages: int,
    split_k: int,
    num_active_loras: torch.Tensor,
    mul_routed_weight: bool = False,
    use_gdc: bool = False,
    use_tma: bool = False,
) -> None:
    routing = _routing(
        lora_a_stacked[0].shape[0],
        _experts(lora_a_stacked),
        topk_weights.shape[0],
        top_k_num,
        sorted_token_ids,
        expert_ids,
        num_tokens_post_padded,
        token_lora_mapping,
        lora_ids,
        num_active_loras,
        adapter_enabled,
        block_size_m,
    )
    _native.shrink(qcurr_hidden_states, lora_a_stacked, h=a_intermediate_cache1, **routing)


def _fused_moe_lora_expand(
    output: torch.Tensor,
    a_intermediate_cache1: torch.Tensor,
    lora_b_stacked: list[torch.Tensor],
    topk_weights: torch.Tensor,
    sorted_token_ids: torch.Tensor | None,
    expert_ids: torch.Tensor,
    num_tokens_post_padded: torch.Tensor | None,
    token_lora_mapping: torch.Tensor,
    top_k_num: int,
    lora_ids: torch.Tensor,
    adapter_enabled: torch.Tensor,
    device: torch.device,
    N: int,  # noqa: N803
    M: int,  # noqa: N803
    EM: int,  # noqa: N803
    K: int,  # noqa: N803
    num_tokens: int,
    num_experts: int,
    num_slices: int,
    max_lora_rank: int,
    w1_output_dim_size: int,
    block_size_m: int,
    block_size_n: int,
    block_size_k: int,
    group_size_m: int,
    num_warps: int,
    num_stages: int,
    split_k: int,
    num_active_loras: torch.Tensor,
    mul_routed_weight: bool = False,
    offset: int = 0,
    use_gdc: bool = False,
    use_tma: bool = False,
    add_inputs: bool = True,
) -> None:
    routing = _routing(
        lora_b_stacked[0].shape[0],
        _experts(lora_b_stacked),
        topk_weights.shape[0],
        top_k_num,
        sorted_token_ids,
        expert_ids,
        num_tokens_post_padded,
        token_lora_mapping,
        lora_ids,
        num_active_loras,
        adapter_enabled,
        block_size_m,
        add_inputs,
    )
    _native.expand(
        a_intermediate_cache1,
        lora_b_stacked,
        out=output,
        topk_weights=topk_weights.float() if mul_routed_weight else None,
        mul_routed_weight=mul_routed_weight,
        accumulate=add_inputs,
        offset=offset,
        **routing,
    )


def _moe_lora_align_block_size(
    topk_ids: torch.Tensor,
    token_lora_mapping: torch.Tensor,
    num_experts: int,
    block_size: int,
    max_loras: int,
    max_num_tokens_padded: int,
    max_num_m_blocks: int,
    sorted_token_ids: torch.Tensor,
    experts_ids: torch.Tensor,
    num_tokens_post_pad: torch.Tensor,
    adapter_enabled: torch.Tensor,
    lora_ids: torch.Tensor,
    expert_map: torch.Tensor | None = None,
) -> None:
    _native.align(
        ids_of(topk_ids),
        token_lora_mapping,
        num_experts,
        block_size,
        max_loras,
        max_num_tokens_padded,
        max_num_m_blocks,
        sorted_token_ids,
        experts_ids,
        num_tokens_post_pad,
        adapter_enabled,
        lora_ids,
        expert_map,
    )


LIBRARY = torch.library.Library("moe_lora", "FRAGMENT")


def register(function: Callable[..., None], mutates: Sequence[str]) -> Callable[..., None]:
    """Makes an operator of ``function``, and returns what calls it.

    The operator is for any device: the function itself says which tensor lies on the wrong one.
    """
    name = function.__name__.removeprefix("_")
    guarded = fallback.guard(name, function)
    LIBRARY.define(name + torch.library.infer_schema(function, mutates_args=tuple(mutates)))
    LIBRARY.impl(name, guarded, "CompositeExplicitAutograd")
    # Nothing is returned, and shapes are checked when there are tensors.
    torch.library.register_fake(f"moe_lora::{name}", lambda *args, **kwargs: None, lib=LIBRARY)
    operator = getattr(torch.ops.moe_lora, name).default

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> None:
        # The dispatcher takes about as long for 32 arguments as the function itself: it is for those who
        # trace.
        if torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack() > 0:
            operator(*args, **kwargs)
        else:
            guarded(*args, **kwargs)

    call.__name__ = call.__qualname__ = name
    return call


fused_moe_lora = register(_fused_moe_lora, ["output"])
fused_moe_lora_shrink = register(_fused_moe_lora_shrink, ["a_intermediate_cache1"])
fused_moe_lora_expand = register(_fused_moe_lora_expand, ["output"])
moe_lora_align_block_size = register(
    _moe_lora_align_block_size, ["sorted_token_ids", "experts_ids", "num_tokens_post_pad"]
)

#: The operators, by the modules of vLLM that define theirs.
OPERATORS = {
    "vllm.lora.ops.triton_ops.fused_moe_lora_op": [
        fused_moe_lora,
        fused_moe_lora_shrink,
        fused_moe_lora_expand,
    ],
    "vllm._custom_ops": [moe_lora_align_block_size],
}
