"""The fused MoE-LoRA operator, as GPU kernels written in Rust.

It adds, for every (token, expert) pair of a mixture-of-experts layer, the low-rank update of the token's own
adapter: ``out[p] (+)= weight[p] * b[l, e] @ (a[l, e] @ x[row(p)])``.

Tensors are PyTorch's, or those of any library with DLPack or the CUDA array interface. Calls never copy them.
Calls are queued on the library's current stream and can be captured into a CUDA graph. They allocate nothing
once their workspace has grown. A dense layer is one of one expert, without ``topk_ids``. ``AdapterTable``
names each slot's weights by their addresses. ``moe_lora.vllm`` has vLLM's operators with these kernels.
"""

from moe_lora._native import Workspace, __version__, expand, forward, route, shrink
from moe_lora.table import AdapterTable

__all__ = ["AdapterTable", "Workspace", "__version__", "expand", "forward", "route", "shrink"]
