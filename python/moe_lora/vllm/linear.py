"""LoRA of linear layers: ``q``, ``k`` and ``v``, ``o``, ``gate`` and ``up`` of a dense model, and others."""

import torch

from moe_lora import _native
from moe_lora.vllm import fallback, ranks
from moe_lora.vllm.operators import register
from moe_lora.vllm.workspaces import room

#: Slices of a call at most.
_SLICES = 4


def _lora_linear(
    y: torch.Tensor,
    x: torch.Tensor,
    lora_a_stacked: list[torch.Tensor],
    lora_b_stacked: list[torch.Tensor],
    token_lora_mapping: torch.Tensor,
    token_indices_sorted_by_lora_ids: torch.Tensor,
    num_tokens_per_lora: torch.Tensor,
    lora_token_start_loc: torch.Tensor,
    lora_ids: torch.Tensor,
    no_lora_flag: torch.Tensor,
    num_active_loras: torch.Tensor,
    max_tokens: int,
    scale: float,
    add_inputs: bool,
) -> None:
    """``y (+)= b (a x)`` for each token's adapter: vLLM's ``lora_shrink`` and ``lora_expand`` in one call.

    :param y: ``[T, ≥ Σ N]``.
    :param x: ``[T, K]``.
    :param lora_a_stacked: of each slice ``[max_loras, 1, R, K]``.
    :param lora_b_stacked: of each slice ``[max_loras, 1, N, R]``.
    :param token_lora_mapping: this and the six that follow are what vLLM's ``LoRAKernelMeta.meta_args`` says
        of the batch. These kernels read the first, and the flag; vLLM's read all.
    :param max_tokens: the most tokens of a batch.
    """
    if no_lora_flag.item() or x.shape[0] == 0:
        return
    offset = 0
    for first in range(0, len(lora_a_stacked), _SLICES):
        a, b = lora_a_stacked[first : first + _SLICES], lora_b_stacked[first : first + _SLICES]
        try:
            if scale != 1.0:
                raise ValueError(f"scale: expected 1, as adapters have theirs in b, got {scale}")
            slots, _, rank, _ = a[0].shape
            place = room(
                x.device, x.shape[0], max_tokens, top_k=1, experts=1, slots=slots, rank=rank, slices=_SLICES
            )
            _native.forward(
                x,
                a,
                b,
                None,
                token_lora_mapping,
                y,
                ranks=ranks.of(a[0]),
                accumulate=add_inputs,
                offset=offset,
                workspace=place.workspace,
            )
        except ValueError as refusal:
            fallback.warn("LoRA of linear layers", refusal)
            h = torch.empty((len(a), x.shape[0], b[0].shape[-1]), dtype=torch.float32, device=x.device)
            batch = (
                token_lora_mapping,
                token_indices_sorted_by_lora_ids,
                num_tokens_per_lora,
                lora_token_start_loc,
                lora_ids,
                no_lora_flag,
                num_active_loras,
            )
            torch.ops.vllm.lora_shrink(x, a, h, *batch, scale)
            torch.ops.vllm.lora_expand(h, b, y, *batch, offset_start=offset, add_inputs=add_inputs)
        offset += sum(factor.shape[-2] for factor in b)


lora_linear = register(_lora_linear, ["y"])
