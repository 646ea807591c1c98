"""The ranks of vLLM's adapters, layer by layer.

vLLM stacks the adapters of a layer in tensors of ``max_lora_rank`` ranks, and fills up with zeros. Who sets
an adapter knows its rank (``set_lora``): it is noted in a tensor ``[max_loras]`` on the device, which kernels
read. So an adapter costs its own rank, and one that leaves a layer alone costs nothing there.
"""

import functools
import weakref
from collections.abc import Iterator
from typing import Any

import torch

#: By the address of a stacked tensor: the tensor, and the ranks of its layer. An address is the tensor's own
#: only as long as the tensor lives.
_NOTED: dict[int, tuple["weakref.ref[torch.Tensor]", torch.Tensor]] = {}


def of(stacked: torch.Tensor) -> torch.Tensor | None:
    """The ranks of the layer whose stacked tensor this is, or a view of it from its beginning.

    ``None`` where nobody noted them: all ranks count then.
    """
    noted = _NOTED.get(stacked.data_ptr())
    if noted is None:
        return None
    owner, ranks = noted
    return ranks if owner() is not None else None


def follow(layer: Any) -> None:
    """Notes the ranks that this LoRA layer of vLLM is given from now on. Every slot is off until then."""
    stacked = list(_stacked(layer))
    if not stacked or getattr(layer, "_moe_lora_ranks", None) is not None:
        return
    slots, most = stacked[0].shape[0], stacked[0].shape[2]
    # One that was made in inference mode could be written in inference mode alone.
    with torch.inference_mode(False):
        ranks = torch.zeros(slots, dtype=torch.int32, device=stacked[0].device)
    set_lora, reset_lora = layer.set_lora, layer.reset_lora

    @functools.wraps(set_lora)
    def set_and_note(index: int, lora_a: Any, lora_b: Any) -> Any:
        # Off, should vLLM's own fail midway.
        ranks[index] = 0
        result = set_lora(index, lora_a, lora_b)
        ranks[index] = min(_rank(lora_a), most)
        return result

    @functools.wraps(reset_lora)
    def reset_and_note(index: int) -> Any:
        ranks[index] = 0
        return reset_lora(index)

    layer._moe_lora_ranks = ranks
    layer.set_lora, layer.reset_lora = set_and_note, reset_and_note
    for tensor in stacked:
        _NOTED[tensor.data_ptr()] = (weakref.ref(tensor), ranks)


def _stacked(layer: Any) -> Iterator[torch.Tensor]:
    """The stacked ``a`` of a layer's slices: ``[max_loras, E or 1, R, K]``."""
    own = vars(layer)
    if "w13_lora_a_stacked" in own:
        # Divided by ranks, an adapter has fewer of them here than it has.
        if not own.get("fully_sharded", True):
            yield from own["w13_lora_a_stacked"]
            yield from own["w2_lora_a_stacked"]
        return
    stacked = own.get("lora_a_stacked")
    config = own.get("lora_config")
    if isinstance(stacked, tuple) and config is not None and not config.fully_sharded_loras:
        yield from (tensor for tensor in stacked if tensor.dim() == 4)


def _rank(lora_a: Any) -> int:
    """The largest rank of the slices that are set: of ``[r, K]`` or ``[E, r, K]`` each."""
    slices = lora_a if isinstance(lora_a, (list, tuple)) else [lora_a]
    return max((a.shape[-2] for a in slices if a is not None), default=0)
