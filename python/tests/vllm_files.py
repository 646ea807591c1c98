"""vLLM's own operator, out of the file of its wheel, for tests that compare with it.

`MOE_LORA_VLLM_OPS` names a folder with `v033/fused_moe_lora_op.py`, as `cargo xtask bench --fetch` fills it.
vLLM's files are no part of this project.
"""

from __future__ import annotations

import importlib.util
import os
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

FOLDER_VAR = "MOE_LORA_VLLM_OPS"


def path() -> Path | None:
    """Where the operator's file is, if anywhere."""
    folder = os.environ.get(FOLDER_VAR)
    file = Path(folder or "", "v033", "fused_moe_lora_op.py")
    return file if folder and file.is_file() else None


def stand_in(name: str, **attributes: Any) -> ModuleType:
    """Puts a module of this name among those that were imported."""
    module = ModuleType(name)
    vars(module).update(attributes)
    sys.modules[name] = module
    return module


def load(file: Path) -> ModuleType:
    """Loads the file as it is; what it imports of vLLM is stood in for."""
    import torch
    import triton
    import triton.language as tl
    import triton.tools.tensor_descriptor  # noqa: F401 (the file uses it without importing it)

    device = torch.cuda.get_device_properties(0)

    def scratch(size: int, alignment: int, stream: int | None) -> torch.Tensor:
        return torch.empty(size, device="cuda", dtype=torch.int8)

    def keep_unregistered(**_: Any) -> None:
        raise AttributeError("the file falls back to its plain functions")

    no, yes = (lambda *_: False), (lambda *_: True)
    platform = SimpleNamespace(
        num_compute_units=lambda _=0: device.multi_processor_count,
        is_cuda=yes,
        is_cuda_alike=yes,
        is_rocm=no,
        is_xpu=no,
    )
    stand_in("vllm")
    stand_in("vllm.distributed", tensor_model_parallel_all_gather=None, tensor_model_parallel_all_reduce=None)
    stand_in("vllm.platforms", current_platform=platform)
    stand_in("vllm.triton_utils", tl=tl, triton=triton)
    stand_in("vllm.triton_utils.allocation", set_triton_allocator=lambda _: triton.set_allocator(scratch))
    stand_in("vllm.utils")
    stand_in(
        "vllm.utils.mem_utils", get_max_shared_memory_bytes=lambda _=0: device.shared_memory_per_block_optin
    )
    stand_in(
        "vllm.utils.torch_utils",
        direct_register_custom_op=keep_unregistered,
        async_tensor_h2d=lambda data, dtype, device: torch.tensor(data, dtype=dtype, device=device),
    )
    stand_in("vllm_files_v033").__path__ = [str(file.parent)]
    newer = device.major >= 9
    stand_in("vllm_files_v033.utils", supports_pdl=lambda _=None: newer, supports_tma=lambda _=None: newer)
    spec = importlib.util.spec_from_file_location("vllm_files_v033.operator", file)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module
