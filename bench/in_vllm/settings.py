"""What a variant's engine is given."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

#: Each variant: whether there is LoRA, whether on experts alone, and whether moe-lora is loaded.
VARIANTS = {
    "base": (False, False, False),
    "off": (True, False, False),
    "on": (True, False, True),
    "off-x": (True, True, False),
    "on-x": (True, True, True),
}
#: Pairs whose outputs should agree: vLLM's own operators, and moe-lora.
AGREEING = (("off", "on"), ("off-x", "on-x"))


@dataclass
class Settings:
    """Sizes of the model, the adapters and the load."""

    layers: int = 48
    adapters: int = 2
    rank: int = 64
    #: Rank that vLLM's tensors are allocated for; 0: the adapters' own.
    max_rank: int = 0
    requests: int = 160
    at_once: int = 80
    tokens_in: int = 1024
    tokens_out: int = 100
    rounds: int = 3
    #: Tokens of a step at most.
    step_tokens: int = 8192
    eager: bool = False
    #: More arguments of ``vllm.LLM``.
    engine: dict[str, Any] = field(default_factory=dict)
    #: Whether to record which kernels a prompt step and a decode step are made of.
    profile: bool = False

    def write(self, path: Path) -> None:
        path.write_text(json.dumps(asdict(self)))

    @classmethod
    def read(cls, path: Path) -> Settings:
        return cls(**json.loads(path.read_text()))


def model(layers: int) -> dict[str, Any]:
    """The configuration of a model of the shape of Qwen3-30B-A3B (its ``config.json``, on Hugging Face)."""
    return {
        "architectures": ["Qwen3MoeForCausalLM"],
        "model_type": "qwen3_moe",
        "attention_bias": False,
        "bos_token_id": 151643,
        "decoder_sparse_step": 1,
        "eos_token_id": 151645,
        "head_dim": 128,
        "hidden_act": "silu",
        "hidden_size": 2048,
        "intermediate_size": 6144,
        "max_position_embeddings": 40960,
        "max_window_layers": layers,
        "mlp_only_layers": [],
        "moe_intermediate_size": 768,
        "norm_topk_prob": True,
        "num_attention_heads": 32,
        "num_experts": 128,
        "num_experts_per_tok": 8,
        "num_hidden_layers": layers,
        "num_key_value_heads": 4,
        "rms_norm_eps": 1e-06,
        "rope_theta": 1000000.0,
        "sliding_window": None,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        "use_cache": True,
        "use_sliding_window": False,
        "vocab_size": 151936,
    }
