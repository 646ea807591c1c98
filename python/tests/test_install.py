"""`moe_lora.vllm.install()` on a vLLM that is not there."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from typing import Any

import pytest

torch = pytest.importorskip("torch", reason="PyTorch is not installed")

import moe_lora.vllm as stand_in  # noqa: E402
from vllm_files import stand_in as module  # noqa: E402

OPERATORS = "vllm.lora.ops.triton_ops.fused_moe_lora_op"


@pytest.fixture
def vllm() -> Iterator[Callable[..., dict[str, Any]]]:
    """Makes the modules of a vLLM whose operator takes these arguments."""
    before = dict(sys.modules)

    def make(operator: Callable[..., None]) -> dict[str, Any]:
        names = ["fused_moe_lora", "fused_moe_lora_shrink", "fused_moe_lora_expand"]
        functions = {name: object() for name in names}
        align = object()
        for package in [
            "vllm",
            "vllm.lora",
            "vllm.lora.ops",
            "vllm.lora.ops.triton_ops",
            "vllm.lora.punica_wrapper",
        ]:
            module(package).__path__ = []
        vars(sys.modules["vllm.lora.ops.triton_ops"]).update(functions)
        module(OPERATORS, _fused_moe_lora=operator, **functions)
        module("vllm._custom_ops", moe_lora_align_block_size=align)
        module(
            "vllm.lora.punica_wrapper.punica_gpu",
            renamed=functions["fused_moe_lora"],
            other=align,
            untouched=3,
        )
        return functions

    yield make
    for name in set(sys.modules) - set(before):
        del sys.modules[name]
    sys.modules.update(before)


def test_replaces_every_import(vllm: Callable[..., dict[str, Any]]) -> None:
    vllm(stand_in._fused_moe_lora)
    stand_in.install()
    assert sys.modules[OPERATORS].fused_moe_lora is stand_in.fused_moe_lora
    assert sys.modules[OPERATORS].fused_moe_lora_expand is stand_in.fused_moe_lora_expand
    assert sys.modules["vllm.lora.ops.triton_ops"].fused_moe_lora_shrink is stand_in.fused_moe_lora_shrink
    assert sys.modules["vllm._custom_ops"].moe_lora_align_block_size is stand_in.moe_lora_align_block_size
    user = sys.modules["vllm.lora.punica_wrapper.punica_gpu"]
    assert user.renamed is stand_in.fused_moe_lora
    assert user.other is stand_in.moe_lora_align_block_size
    assert user.untouched == 3
    stand_in.install()
    assert user.renamed is stand_in.fused_moe_lora


def test_refuses_an_operator_with_other_arguments(vllm: Callable[..., dict[str, Any]]) -> None:
    def operator(output: object, adapter_enabled: object) -> None: ...

    functions = vllm(operator)
    with pytest.raises(RuntimeError, match="takes other arguments: output, adapter_enabled"):
        stand_in.install()
    assert sys.modules[OPERATORS].fused_moe_lora is functions["fused_moe_lora"]
