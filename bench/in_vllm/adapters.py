"""Adapter folders in PEFT's form, with random weights: LoRA on each expert and on attention."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

#: Standard deviation of b; a's keeps the size of what it is multiplied with.
B_DEVIATION = 0.02

EXPERTS = ("gate_proj", "up_proj", "down_proj")
ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")


def write(folder: Path, number: int, rank: int, model: dict[str, Any]) -> None:
    """Writes an adapter for a model, another one for each ``number``. 3.3 GB at rank 64 and 48 layers."""
    folder.mkdir(parents=True, exist_ok=True)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    generator = torch.Generator(device).manual_seed(1000 + number)
    tensors = {}
    for name, wide, narrow in _modules(model):
        for factor, shape, deviation in (
            ("A", (rank, narrow), narrow**-0.5),
            ("B", (wide, rank), B_DEVIATION),
        ):
            values = torch.randn(shape, generator=generator, device=device, dtype=torch.bfloat16)
            tensors[f"base_model.model.model.layers.{name}.lora_{factor}.weight"] = (values * deviation).cpu()
    save_file(tensors, folder / "adapter_model.safetensors")
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "r": rank,
        "lora_alpha": rank,
        "lora_dropout": 0.0,
        "bias": "none",
        "target_modules": [*EXPERTS, *ATTENTION],
    }
    (folder / "adapter_config.json").write_text(json.dumps(config))


def _modules(model: dict[str, Any]) -> Iterator[tuple[str, int, int]]:
    """The linear layers that are adapted, with the widths of their outputs and inputs."""
    hidden, expert = model["hidden_size"], model["moe_intermediate_size"]
    query = model["num_attention_heads"] * model["head_dim"]
    key = model["num_key_value_heads"] * model["head_dim"]
    for layer in range(model["num_hidden_layers"]):
        for name, (wide, narrow) in zip(
            ATTENTION, ((query, hidden), (key, hidden), (key, hidden), (hidden, query)), strict=True
        ):
            yield f"{layer}.self_attn.{name}", wide, narrow
        for number in range(model["num_experts"]):
            for name, (wide, narrow) in zip(
                EXPERTS, ((expert, hidden), (expert, hidden), (hidden, expert)), strict=True
            ):
                yield f"{layer}.mlp.experts.{number}.{name}", wide, narrow
