"""A plugin of vLLM for the benchmark: dummy weights as those of a trained model are spread.

vLLM's own dummy weights are all but zero, so that any two tokens' logits are alike and greedy outputs say
nothing. These are normal with a deviation of 0.02; vectors, which are norms' weights, are 1.
"""

from __future__ import annotations

from typing import Any


def install() -> None:
    """Replaces the function that fills a parameter when the load format is ``dummy``."""
    import torch
    from vllm.lora import lora_model, lora_weights
    from vllm.model_executor.model_loader import dummy_loader

    theirs = dummy_loader.initialize_single_dummy_weight
    if theirs.__module__ == __name__:
        return
    generators: dict[torch.device, torch.Generator] = {}

    def fill(param: Any, *args: Any, **kwargs: Any) -> Any:
        plain = param.device.type != "meta" and param.dtype in (torch.bfloat16, torch.float16, torch.float32)
        if not plain or param.dim() == 0 or getattr(param, "dummy_weight_value", None) is not None:
            return theirs(param, *args, **kwargs)
        if param.dim() == 1:
            return param.data.fill_(1.0)
        if param.device not in generators:
            generators[param.device] = torch.Generator(param.device).manual_seed(1)
        return param.data.normal_(0.0, 0.02, generator=generators[param.device])

    dummy_loader.initialize_single_dummy_weight = fill
    # An adapter has tens of thousands of tensors, and to pin each takes minutes. Stacked ones still are.
    lora_model.PIN_MEMORY = lora_weights.PIN_MEMORY = False
