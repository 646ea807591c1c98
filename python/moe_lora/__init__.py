"""The fused MoE-LoRA operator, as GPU kernels written in Rust.

For every (token, expert) pair of a mixture-of-experts layer, the low-rank update of the adapter that the token
uses: ``out[p] (+)= weight[p] * b[l, e] @ (a[l, e] @ x[row(p)])``.

Tensors are PyTorch's, or those of any library that speaks DLPack or the CUDA array interface. They are read where
they are, never copied; calls are queued on the library's current stream, allocate nothing once their workspace has
grown, and can be captured into a CUDA graph. ``moe_lora.vllm`` stands in for vLLM's operator.
"""

from moe_lora._native import Workspace, __version__, expand, forward, route, shrink

__all__ = ["Workspace", "__version__", "expand", "forward", "route", "shrink"]
