"""vLLM 0.33's pair of kernels for dense layers, ``lora_shrink`` and ``lora_expand``, out of its wheel.

The files are loaded as they are; the modules of vLLM around them are stood in for, as in :mod:`bench.peers`.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from .fetch import DENSE, dense_file
from .peers import load_file, stand_ins

#: Where vLLM has the files, and where they import one another from.
PACKAGE = "vllm.lora.ops.triton_ops"


@dataclass(frozen=True)
class Pair:
    """The functions, and what vLLM makes of a batch before its first layer."""

    shrink: Any
    expand: Any
    #: ``LoRAKernelMeta``.
    metadata: Any
    #: ``utils``, which keeps tables of addresses for as long as the process runs.
    utils: ModuleType

    @staticmethod
    def load(peers: Path) -> Pair:
        """From the folder that ``python -m bench.fetch`` filled."""
        folder = peers / "v033"
        for name in DENSE:
            if not (folder / dense_file(name)).is_file():
                raise FileNotFoundError(
                    f"{folder / dense_file(name)}: fetch vLLM's files with python -m bench.fetch"
                )
        stand_ins()
        # In the order of DENSE: each imports those before it.
        loaded = {name: load_file(f"{PACKAGE}.{name}", folder / dense_file(name)) for name in DENSE}
        return Pair(
            shrink=loaded["lora_shrink_op"].lora_shrink,
            expand=loaded["lora_expand_op"].lora_expand,
            metadata=loaded["lora_kernel_metadata"].LoRAKernelMeta,
            utils=loaded["utils"],
        )

    def forget(self) -> None:
        """Forgets tables of addresses, at which other weights may lie by now."""
        self.utils._LORA_A_PTR_DICT.clear()
        self.utils._LORA_B_PTR_DICT.clear()


class DensePeer:
    """A layer as vLLM's ``PunicaWrapperGPU.add_lora_linear`` calls it, for one number of tokens."""

    def __init__(self, pair: Pair, token_lora: torch.Tensor, adapters: int) -> None:
        self.pair, self.token_lora = pair, token_lora
        # The counts of adapters that graphs are captured for, unless vLLM is told to capture more.
        self.meta = pair.metadata.make(adapters, len(token_lora), token_lora.device, [adapters + 1])

    def route(self) -> None:
        """vLLM's metadata, once a batch: by torch, with waits for the device."""
        self.meta.prepare_tensors(self.token_lora)

    def forward(
        self, x: torch.Tensor, a: list[torch.Tensor], b: list[torch.Tensor], out: torch.Tensor
    ) -> None:
        """``out += b @ a @ x``."""
        # The arguments are the same for both: specialize_active_lora is off unless asked for.
        meta = self.meta.meta_args(len(x), False)
        h = torch.empty(len(a), len(x), a[0].shape[-2], dtype=torch.float32, device=x.device)
        self.pair.shrink(x, a, h, *meta, 1.0)
        self.pair.expand(h, b, out, *meta, offset_start=0, add_inputs=True)
