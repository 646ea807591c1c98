"""What the plugin takes vLLM's functions to be, held to the files of each release's wheel.

`MOE_LORA_VLLM_OPS` names a folder with them, as `python -m bench.fetch --every-release` fills it.
"""

from __future__ import annotations

import ast
import os
from pathlib import Path

import pytest
import vllm_files

pytest.importorskip("torch", reason="PyTorch is not installed")

from moe_lora.vllm import operators, versions  # noqa: E402

GPU = "vllm/lora/punica_wrapper/punica_gpu.py"
META = "vllm/lora/ops/triton_ops/lora_kernel_metadata.py"
BATCH = ["token_lora_mapping", "token_indices_sorted_by_lora_ids", "num_tokens_per_lora"]
BATCH += ["lora_token_start_loc", "lora_ids", "no_lora_flag_cpu", "num_active_loras"]


def releases() -> list[Path]:
    folder = Path(os.environ.get(vllm_files.FOLDER_VAR, ""), "releases")
    found = [folder / f"{minor}.{patch}" for minor in versions.SUPPORTED for patch in range(9)]
    return [path for path in found if path.is_dir()]


def functions(file: Path) -> dict[str, list[str]]:
    """The arguments of each function of a file, by its name."""
    found = {}
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.FunctionDef):
            a = node.args
            others = [argument for argument in (a.vararg, a.kwarg) if argument is not None]
            found[node.name] = [one.arg for one in [*a.posonlyargs, *a.args, *a.kwonlyargs, *others]]
    return found


def test_every_supported_release_is_there() -> None:
    there = {".".join(path.name.split(".")[:2]) for path in releases()}
    if not there:
        pytest.skip("no files of vLLM's releases: cargo xtask nightly --only peers fetches them")
    assert there == set(versions.SUPPORTED)


@pytest.mark.parametrize("release", releases(), ids=lambda path: path.name)
def test_functions_take_what_is_known(release: Path) -> None:
    gpu = functions(release / GPU)
    for methods in versions.METHODS.values():
        for name, expected in methods.items():
            assert gpu[name] == expected, name
    # What goes to vLLM's own code is called so.
    assert gpu["moe_lora_align_block_size"][1:7] == [
        "topk_ids", "num_tokens", "block_size", "num_experts", "max_loras", "adapter_enabled",
    ]  # fmt: skip
    assert gpu["add_lora_fused_moe"][1:14] == [
        "y", "x", "lora_a_stacked", "lora_b_stacked", "topk_weights", "sorted_token_ids", "expert_ids",
        "num_tokens_post_padded", "max_lora_rank", "top_k_num", "shrink_config", "expand_config",
        "adapter_enabled",
    ]  # fmt: skip
    folder = release / "vllm/lora/ops/triton_ops"
    shrink = functions(folder / "lora_shrink_op.py")["_lora_shrink"]
    assert shrink == ["inputs", "lora_a_weights", "output_tensor", *BATCH, "scaling"]
    expand = functions(folder / "lora_expand_op.py")["_lora_expand"]
    assert expand == ["inputs", "lora_b_weights", "output_tensor", *BATCH, "offset_start", "add_inputs"]
    assert functions(release / META)["meta_args"] == ["self", "token_nums", "specialize_active_lora"]
    layer = functions(release / "vllm/lora/layers/base.py")
    assert layer["set_mapping"] == ["self", "punica_wrapper"]
    assert layer["set_lora"] == ["self", "index", "lora_a", "lora_b"]
    assert layer["reset_lora"] == ["self", "index"]
    assert functions(release / "vllm/envs.py")["compile_factors"] == []
    assert functions(release / "vllm/platforms/cuda.py")["get_punica_wrapper"] == ["cls"]


@pytest.mark.parametrize("release", releases(), ids=lambda path: path.name)
def test_operators_take_what_theirs_take(release: Path) -> None:
    theirs = functions(release / "vllm/lora/ops/triton_ops/fused_moe_lora_op.py")
    halves = [operators._fused_moe_lora_shrink, operators._fused_moe_lora_expand]
    for function in [operators._fused_moe_lora, *halves]:
        expected = theirs[function.__name__]
        assert versions.arguments(function)[: len(expected)] == expected
    align = functions(release / "vllm/_custom_ops.py")["moe_lora_align_block_size"]
    assert versions.arguments(operators._moe_lora_align_block_size) == align
