"""vLLM's fused MoE-LoRA operators, straight from the files of vLLM's own wheels.

``cargo xtask bench --fetch`` (or fetch.py) brings the files into a folder that git ignores:

``v017``
    release 0.17.1: the two-kernel operator of pull request 32770 (shrink, then expand)
``v033``
    release 0.33.0: one-shot and small-batch kernels, chosen by vLLM's own dispatch, the compiled library
    that has vLLM's routing step, ``moe_lora_align_block_size``, and the files of the pair of kernels for
    dense layers, which :mod:`bench.dense_peer` loads

An operator's file is loaded as it is. Only the vLLM modules that it imports are stood in for, so torch
and triton are all that must be installed.
"""

from __future__ import annotations

import importlib.util
import sys
import types
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from .data import Projection, Routing
from .vllm_defaults import default_config, is_naive


def _module(name: str, **attributes: Any) -> types.ModuleType:
    module = types.ModuleType(name)
    module.__dict__.update(attributes)
    sys.modules[name] = module
    return module


def _not_registered(**_: Any) -> None:
    raise AttributeError("operators are called directly here")


def stand_ins() -> None:
    """Puts modules in the place of those of vLLM that its operators import, with vLLM's default settings."""
    import triton
    import triton.language
    import triton.tools.tensor_descriptor  # The operators use it without importing it.

    device = torch.cuda.get_device_properties(0)
    settings = types.SimpleNamespace(
        VLLM_BATCH_INVARIANT=False,
        VLLM_LORA_DISABLE_PDL=False,
        VLLM_LORA_ENABLE_DUAL_STREAM=False,
        VLLM_TUNED_CONFIG_FOLDER=None,
    )
    silence = types.SimpleNamespace(warning_once=lambda *_: None, info_once=lambda *_: None)
    _module("vllm", envs=settings)
    _module("vllm.logger", init_logger=lambda _: silence)
    _module("vllm.distributed", tensor_model_parallel_all_gather=None, tensor_model_parallel_all_reduce=None)
    _module(
        "vllm.platforms",
        current_platform=types.SimpleNamespace(
            num_compute_units=lambda _=0: device.multi_processor_count,
            is_xpu=lambda: False,
            is_rocm=lambda: False,
            is_cuda=lambda: True,
            is_cuda_alike=lambda: True,
            has_device_capability=lambda wanted: (device.major, device.minor) >= divmod(wanted, 10),
            is_device_capability=lambda wanted: (device.major, device.minor) == divmod(wanted, 10),
        ),
    )
    _module("vllm.triton_utils", tl=triton.language, triton=triton)
    _module(
        "vllm.triton_utils.allocation",
        set_triton_allocator=lambda device: triton.set_allocator(
            lambda size, _align, _stream: torch.empty(size, device=device, dtype=torch.int8)
        ),
    )
    _module("vllm.utils")
    _module("vllm.utils.math_utils", next_power_of_2=lambda n: 1 << (n - 1).bit_length())
    _module(
        "vllm.utils.mem_utils",
        get_max_shared_memory_bytes=lambda _=0: device.shared_memory_per_block_optin,
    )
    _module(
        "vllm.utils.torch_utils",
        direct_register_custom_op=_not_registered,
        async_tensor_h2d=lambda data, dtype, device: torch.tensor(data, dtype=dtype, device=device),
    )


def load_file(name: str, file: Path) -> types.ModuleType:
    """A file of vLLM's, as it is, as the module of this name."""
    spec = importlib.util.spec_from_file_location(name, file)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


def load_operator(folder: Path) -> types.ModuleType:
    """One release's ``fused_moe_lora_op.py``, with stand-ins for the modules of vLLM that it imports."""
    stand_ins()
    package = f"vllm_{folder.name}"
    _module(package).__path__ = [str(folder)]
    is_hopper_or_later = torch.cuda.get_device_properties(0).major >= 9
    _module(
        f"{package}.utils",
        supports_pdl=lambda _=None: is_hopper_or_later,
        supports_tma=lambda _=None: is_hopper_or_later,
    )
    return load_file(f"{package}.op", folder / "fused_moe_lora_op.py")


@dataclass(frozen=True)
class Operator:
    """Functions with the arguments of vLLM's."""

    #: ``fused_moe_lora``.
    forward: Callable[..., None]
    #: ``moe_lora_align_block_size``, the routing step.
    align: Callable[..., None]
    #: Uploads the table of some matrices' addresses, which a capture could not; where it has one.
    upload: Callable[[list[torch.Tensor], torch.device], object] | None


class Vllm:
    """Both releases' operators, and the routing step that serves both."""

    def __init__(self, folder: Path) -> None:
        for name in ("v017/fused_moe_lora_op.py", "v033/fused_moe_lora_op.py", "v033/_moe_C.so"):
            if not (folder / name).is_file():
                raise FileNotFoundError(f"{folder / name}: fetch vLLM's files with python -m bench.fetch")
        torch.ops.load_library(str(folder / "v033/_moe_C.so"))
        align = torch.ops._moe_C.moe_lora_align_block_size
        self.operators = {
            name: Operator(module._fused_moe_lora, align, module._get_ptr)
            for name, module in (
                ("pr32770", load_operator(folder / "v017")),
                ("vllm033", load_operator(folder / "v033")),
            )
        }

    def peer(self, name: str, routing: Routing, rank: int, block_m: int | None = None) -> Peer:
        """One release's operator; ``block_m`` other than None overrides the block size it ships with."""
        return Peer(self.operators[name], routing, rank, block_m)


class Peer:
    """An operator with vLLM's arguments on one routing, which is read anew by each :meth:`route`."""

    def __init__(self, operator: Operator, routing: Routing, rank: int, block_m: int | None) -> None:
        self.operator, self.routing, self.rank = operator, routing, rank
        tokens, experts = routing.tokens, routing.experts
        self.shrink = default_config(tokens, experts, rank, "shrink")
        self.expand = default_config(tokens, experts, rank, "expand")
        if block_m is not None:
            self.shrink[0] = self.expand[0] = block_m
        self.naive = is_naive(tokens, routing.top_k, experts, routing.adapters)
        slots = routing.adapters
        self.enabled = torch.ones(slots + 1, dtype=torch.int32, device="cuda")
        self.lora_ids = torch.arange(slots + 1, dtype=torch.int32, device="cuda")
        self.lora_ids[min(slots, tokens) :] = -1
        self.active = torch.tensor([min(slots, tokens)], dtype=torch.int32)
        if self.naive:
            self.sorted_ids = self.padded = None
            self.expert_ids = routing.topk_ids.view(-1)
        else:
            block, pairs = self.shrink[0], routing.topk_ids.numel()
            self.room = pairs * block if pairs < experts else pairs + experts * (block - 1)
            self.blocks = -(-self.room // block)
            integers = dict(dtype=torch.int32, device="cuda")
            self.sorted_ids = torch.empty(slots, self.room, **integers)
            self.expert_ids = torch.full((slots, self.blocks), -1, **integers)
            self.padded = torch.zeros(slots, **integers)

    def prepare(self, *projections: Projection) -> None:
        """Sets up what a call inside the capture of a graph could not."""
        for projection in projections:
            for matrices in (*projection.weights.a, *projection.weights.b):
                if self.operator.upload is not None:
                    self.operator.upload(matrices, projection.x.device)

    def use(self, routing: Routing) -> None:
        """Another routing, of the same sizes, from the next call on."""
        self.routing = routing
        if self.naive:
            self.expert_ids = routing.topk_ids.view(-1)

    def route(self) -> None:
        """vLLM's routing step: nothing where pairs stay unsorted."""
        if self.naive:
            return
        routing = self.routing
        self.operator.align(
            routing.topk_ids,
            routing.token_lora,
            routing.experts,
            self.shrink[0],
            routing.adapters,
            self.room,
            self.blocks,
            self.sorted_ids,
            self.expert_ids,
            self.padded,
            self.enabled,
            self.lora_ids,
            None,
        )

    def forward(self, projection: Projection, chosen: int) -> None:
        """Both products, on the routing that :meth:`route` left."""
        self.operator.forward(
            projection.out,
            projection.x,
            projection.weights.a[chosen],
            projection.weights.b[chosen],
            self.routing.topk_weights,
            self.sorted_ids,
            self.expert_ids,
            self.padded,
            self.routing.token_lora,
            self.rank,
            self.routing.top_k,
            self.lora_ids,
            self.active,
            self.enabled,
            *self.shrink,
            *self.expand,
            projection.weighted,
            False,  # fully_sharded
            0,  # offset
        )

    def routed(self, projection: Projection, chosen: int) -> None:
        """Routing and both products."""
        self.route()
        self.forward(projection, chosen)
