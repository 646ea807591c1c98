"""The releases of vLLM that the plugin knows, and what it takes the replaced functions' arguments to be.

Tests hold both to the files of each release's wheel.
"""

import inspect
from collections.abc import Callable
from typing import Any

#: Releases that were tested; others are left alone.
SUPPORTED = ("0.26", "0.27", "0.28", "0.29", "0.30", "0.31", "0.32", "0.33")

_WEIGHTS = ["self", "y", "x", "lora_a_stacked", "lora_b_stacked"]

#: Methods of ``vllm.lora.punica_wrapper.punica_gpu.PunicaWrapperGPU`` that are replaced, and their arguments;
#: those of one kind together or not at all.
METHODS: dict[str, dict[str, list[str]]] = {
    "LoRA of experts": {
        "add_lora_w13": [
            *_WEIGHTS,
            *("topk_ids", "topk_weights", "expert_map", "w1", "w2", "num_tokens", "top_k_num", "max_loras"),
            *("adapter_enabled", "local_num_experts", "top_k", "num_slices", "fully_sharded"),
            *("use_tuned_config", "add_inputs", "token_lora_mapping"),
        ],
        "add_lora_w2": [
            *_WEIGHTS,
            *("topk_weights", "sorted_token_ids_lora", "expert_ids_lora", "num_tokens_post_padded_lora"),
            *("token_lora_mapping", "num_tokens", "w1", "w2", "top_k_num", "max_loras", "adapter_enabled"),
            *("top_k", "fully_sharded", "tp_rank", "use_tuned_config", "add_inputs"),
        ],
    },
    "LoRA of linear layers": {
        "add_lora_linear": [*_WEIGHTS, "scale", "output_slices", "buffer", "kwargs"],
    },
}


def is_supported(version: str) -> bool:
    """Whether this release was tested, or is a patch of one that was."""
    return ".".join(version.split(".")[:2]) in SUPPORTED


def arguments(function: Callable[..., Any]) -> list[str]:
    """The names of a function's arguments."""
    return list(inspect.signature(function).parameters)
