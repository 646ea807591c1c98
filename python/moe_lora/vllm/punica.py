"""vLLM's ``PunicaWrapperGPU`` with these kernels: where vLLM adds LoRA to layers, and still has the ids.

vLLM's platform names the class of the wrapper that its LoRA layers call. The plugin has it name this one.
"""

from typing import Any, NamedTuple

import torch
from vllm.lora.layers.base import BaseLayerWithLoRA
from vllm.lora.punica_wrapper.punica_gpu import PunicaWrapperGPU

from moe_lora import _native
from moe_lora.vllm import fallback, ranks
from moe_lora.vllm.linear import lora_linear
from moe_lora.vllm.operators import add_sharded, ids_of
from moe_lora.vllm.plugin import unknown_methods
from moe_lora.vllm.versions import METHODS
from moe_lora.vllm.workspaces import Room, room

#: Slices of a layer of experts: gate and up.
_SLICES = 2


class _Handover(NamedTuple):
    """What ``add_lora_w13`` leaves for ``add_lora_w2``, in the place of vLLM's arrays: who goes where."""

    topk_ids: torch.Tensor
    expert_map: torch.Tensor | None
    experts: int
    #: Where the route is kept, and what says that it is still this one.
    room: Room | None
    route: object | None

    def routing(
        self, token_lora: torch.Tensor | None, adapter_enabled: torch.Tensor, a: tuple[torch.Tensor, ...]
    ) -> dict[str, Any]:
        """The ids, as a call takes them that makes a route of its own."""
        return {
            "topk_ids": self.topk_ids,
            "token_lora": token_lora,
            "adapter_enabled": adapter_enabled,
            "expert_map": self.expert_map,
            "ranks": ranks.of(a[0]),
        }


class MoeLoraPunicaWrapper(PunicaWrapperGPU):  # type: ignore[misc]
    """LoRA on layers of experts and on linear layers as one call of the operator each.

    What the operator refuses goes to vLLM's own method, with one warning.
    """

    def add_lora_w13(
        self,
        y: torch.Tensor,
        x: torch.Tensor,
        lora_a_stacked: tuple[torch.Tensor, ...],
        lora_b_stacked: tuple[torch.Tensor, ...],
        topk_ids: torch.Tensor,
        topk_weights: torch.Tensor,
        expert_map: torch.Tensor | None,
        w1: torch.Tensor,
        w2: torch.Tensor,
        num_tokens: int,
        top_k_num: int,
        max_loras: int,
        adapter_enabled: torch.Tensor,
        local_num_experts: int,
        top_k: int,
        num_slices: int,
        fully_sharded: bool,
        use_tuned_config: bool,
        add_inputs: bool = True,
        token_lora_mapping: torch.Tensor | None = None,
    ) -> tuple[Any, Any, Any, Any]:
        """Gate and up: ``y[t, j] (+)= b (a x[t])`` by the ids of each token."""
        theirs = super().add_lora_w13
        given: list[Any] = [y, x, lora_a_stacked, lora_b_stacked, topk_ids, topk_weights, expert_map, w1, w2]
        given += [num_tokens, top_k_num, max_loras, adapter_enabled, local_num_experts, top_k, num_slices]
        given += [fully_sharded, use_tuned_config, add_inputs, token_lora_mapping]
        if torch.compiler.is_compiling():
            return theirs(*given)  # type: ignore[no-any-return]
        if token_lora_mapping is None:
            token_lora_mapping = self.token_mapping_meta.token_lora_mapping[:num_tokens]
        ids = ids_of(topk_ids)
        handover = _Handover(ids, expert_map, local_num_experts, None, None)
        if self.token_mapping_meta.no_lora_flag_cpu.item():
            return None, handover, None, token_lora_mapping
        tokens, chosen = ids.shape
        out = y.view(-1, chosen, y.shape[-1])
        routing = handover.routing(token_lora_mapping, adapter_enabled, lora_a_stacked)
        try:
            if fully_sharded:
                sizes = (tokens, chosen, local_num_experts)
                delta = {"accumulate": add_inputs}
                add_sharded(x, lora_a_stacked, lora_b_stacked, out, sizes, routing, delta)
            else:
                place = self._room(x, tokens, chosen, local_num_experts, lora_a_stacked[0])
                # Should the call fail, nobody has this route.
                place.route = None
                _native.forward(
                    x,
                    lora_a_stacked,
                    lora_b_stacked,
                    out=out,
                    accumulate=add_inputs,
                    experts=local_num_experts,
                    workspace=place.workspace,
                    **routing,
                )
                place.route = object()
                handover = handover._replace(room=place, route=place.route)
        except ValueError as refusal:
            fallback.warn("LoRA of experts' gate and up", refusal)
            return theirs(*given)  # type: ignore[no-any-return]
        return None, handover, None, token_lora_mapping

    def add_lora_w2(
        self,
        y: torch.Tensor,
        x: torch.Tensor,
        lora_a_stacked: tuple[torch.Tensor, ...],
        lora_b_stacked: tuple[torch.Tensor, ...],
        topk_weights: torch.Tensor,
        sorted_token_ids_lora: torch.Tensor | None,
        expert_ids_lora: torch.Tensor | None,
        num_tokens_post_padded_lora: torch.Tensor | None,
        token_lora_mapping: torch.Tensor | None,
        num_tokens: int,
        w1: torch.Tensor,
        w2: torch.Tensor,
        top_k_num: int,
        max_loras: int,
        adapter_enabled: torch.Tensor,
        top_k: int,
        fully_sharded: bool,
        tp_rank: int,
        use_tuned_config: bool,
        add_inputs: bool = True,
    ) -> None:
        """Down: ``y[t, j] (+)= weight[t, j] b (a x[t, j])``, on the route of ``add_lora_w13``."""
        before = [y, x, lora_a_stacked, lora_b_stacked, topk_weights]
        behind: list[Any] = [token_lora_mapping, num_tokens, w1, w2, top_k_num, max_loras, adapter_enabled]
        behind += [top_k, fully_sharded, tp_rank, use_tuned_config, add_inputs]
        if not isinstance(expert_ids_lora, _Handover):
            arrays = [sorted_token_ids_lora, expert_ids_lora, num_tokens_post_padded_lora]
            super().add_lora_w2(*before, *arrays, *behind)
            return
        if self.token_mapping_meta.no_lora_flag_cpu.item():
            return
        ids, _, experts, place, route = expert_ids_lora
        tokens, chosen = ids.shape
        routing = expert_ids_lora.routing(token_lora_mapping, adapter_enabled, lora_a_stacked)
        delta = {
            "topk_weights": topk_weights.float(),
            "mul_routed_weight": True,
            "accumulate": add_inputs,
        }
        try:
            if fully_sharded:
                delta["offset"] = lora_b_stacked[0].shape[-2] * tp_rank
                sizes = (tokens, chosen, experts)
                add_sharded(x, lora_a_stacked, lora_b_stacked, y, sizes, routing, delta)
                return
            if place is None or place.route is not route:
                place = self._room(x, tokens, chosen, experts, lora_a_stacked[0])
                place.route = None
            else:
                routing = {}
            _native.forward(
                x,
                lora_a_stacked,
                lora_b_stacked,
                out=y,
                experts=experts,
                workspace=place.workspace,
                **routing,
                **delta,
            )
        except ValueError as refusal:
            fallback.warn("LoRA of experts' down", refusal)
            with_arrays = _WithArrays(self, expert_ids_lora, max_loras)
            PunicaWrapperGPU.add_lora_w2(with_arrays, *before, None, None, None, *behind)

    def add_lora_linear(
        self,
        y: torch.Tensor,
        x: torch.Tensor,
        lora_a_stacked: tuple[torch.Tensor, ...],
        lora_b_stacked: tuple[torch.Tensor, ...],
        scale: float,
        output_slices: tuple[int, ...],
        *,
        buffer: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> None:
        """Linear layers: ``y[t] (+)= b (a x[t])`` for each slice."""
        lora_linear(
            y.view(-1, y.shape[-1]),
            x.view(-1, x.shape[-1]),
            list(lora_a_stacked),
            list(lora_b_stacked),
            *self.token_mapping_meta.meta_args(x.shape[0], self.lora_config.specialize_active_lora),
            self.token_mapping_meta.token_lora_mapping.shape[0],
            scale,
            kwargs.get("add_inputs", True),
        )

    def _room(self, x: torch.Tensor, tokens: int, top_k: int, experts: int, a: torch.Tensor) -> Room:
        most = self.token_mapping_meta.token_lora_mapping.shape[0]
        slots, _, rank, _ = a.shape
        return room(
            x.device, tokens, most, top_k=top_k, experts=experts, slots=slots, rank=rank, slices=_SLICES
        )


class _WithArrays:
    """vLLM's wrapper for one call of its own ``add_lora_w2`` behind an ``add_lora_w13`` that made no arrays.

    Makes them, in the blocks that the call asks for.
    """

    def __init__(self, wrapper: MoeLoraPunicaWrapper, handover: _Handover, max_loras: int) -> None:
        self._wrapper, self._handover, self._max_loras = wrapper, handover, max_loras

    def __getattr__(self, name: str) -> Any:
        return getattr(self._wrapper, name)

    def add_lora_fused_moe(
        self,
        y: torch.Tensor,
        x: torch.Tensor,
        lora_a_stacked: tuple[torch.Tensor, ...],
        lora_b_stacked: tuple[torch.Tensor, ...],
        topk_weights: torch.Tensor,
        _sorted: None,
        _expert_ids: None,
        _padded: None,
        max_lora_rank: int,
        top_k_num: int,
        shrink_config: dict[str, int],
        expand_config: dict[str, int],
        adapter_enabled: torch.Tensor,
        *flags: Any,
        token_lora_mapping: torch.Tensor | None = None,
        **more: Any,
    ) -> None:
        ids, expert_map, experts, _, _ = self._handover
        mapping, sorted_ids, expert_ids, padded = self._wrapper.moe_lora_align_block_size(
            ids,
            ids.shape[0],
            int(shrink_config.get("BLOCK_SIZE_M") or 64),
            experts,
            self._max_loras,
            adapter_enabled,
            expert_map,
            token_lora_mapping=token_lora_mapping,
        )
        self._wrapper.add_lora_fused_moe(
            y,
            x,
            lora_a_stacked,
            lora_b_stacked,
            topk_weights,
            sorted_ids.view(self._max_loras, -1),
            expert_ids.view(self._max_loras, -1),
            padded,
            max_lora_rank,
            top_k_num,
            shrink_config,
            expand_config,
            adapter_enabled,
            *flags,
            token_lora_mapping=mapping,
            **more,
        )


def _leave_what_has_changed() -> None:
    """Takes back the methods whose arguments in this vLLM are not those that were replaced."""
    for kind, why in unknown_methods().items():
        fallback.warn(kind, why)
        for name in METHODS[kind]:
            delattr(MoeLoraPunicaWrapper, name)


def _follow_ranks() -> None:
    """Has the LoRA layers that are made from now on note the ranks of their adapters."""
    theirs = BaseLayerWithLoRA.set_mapping

    def set_mapping(self: Any, punica_wrapper: Any) -> None:
        theirs(self, punica_wrapper)
        if isinstance(punica_wrapper, MoeLoraPunicaWrapper):
            ranks.follow(self)

    BaseLayerWithLoRA.set_mapping = set_mapping


_leave_what_has_changed()
_follow_ranks()
