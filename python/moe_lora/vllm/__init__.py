"""vLLM with this package's kernels underneath.

Where both packages are installed vLLM loads :func:`install` as a plugin. LoRA of experts and of linear layers
then runs as one call of the operator each (:mod:`moe_lora.vllm.punica`), and vLLM's operators for it are
replaced by those of :mod:`moe_lora.vllm.operators`, which can be called without vLLM too. What the kernels
refuse goes to vLLM's own code, with one warning.

==================================  ================================================================
``python -m moe_lora.vllm doctor``  says what would be replaced
``MOE_LORA_VLLM=off``               switches the plugin off
``VLLM_PLUGINS``                    vLLM's own list of the plugins that it loads; unset: all
==================================  ================================================================

Needs PyTorch. vLLM is needed by the plugin, and by ``fully_sharded`` for its collectives.
"""

from moe_lora.vllm.operators import (
    fused_moe_lora,
    fused_moe_lora_expand,
    fused_moe_lora_shrink,
    moe_lora_align_block_size,
)
from moe_lora.vllm.plugin import install
from moe_lora.vllm.workspaces import nbytes as workspace_nbytes

__all__ = [
    "fused_moe_lora",
    "fused_moe_lora_expand",
    "fused_moe_lora_shrink",
    "install",
    "moe_lora_align_block_size",
    "workspace_nbytes",
]
