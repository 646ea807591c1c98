"""What is made of a whole vLLM's outputs and times."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from bench import report
from bench.in_vllm.agreement import agreement
from bench.in_vllm.settings import VARIANTS, Settings, model
from bench.records import Results


def timed(rate: float, decode: float) -> dict[str, Any]:
    return {"requests_per_s": rate, "decode_ms": decode, "prompt_ms": 100.4, "first_token_ms": 2000.0}


def test_the_table_counts_the_best_round_of_base_as_one() -> None:
    records: list[dict[str, Any]] = [
        {"kind": "machine", "device": "NVIDIA H200"},
        {"kind": "vllm", "variant": "base", "results": {"base": {"rounds": [timed(10, 21), timed(20, 20)]}}},
        {"kind": "vllm", "variant": "on", "results": {"on": {"rounds": [timed(16, 24.456)]}}},
        {"kind": "vllm", "variant": "off", "results": {"off": {"failed": "no memory"}}},
    ]
    lines = report.in_vllm(Results(records)).splitlines()
    assert lines[2:] == [
        "| none | 20.0 | 100% | 20.00 | 100 | 2,000 |",
        "| on experts and attention, moe-lora | 16.0 | 80% | 24.46 | 100 | 2,000 |",
    ]


def test_every_variant_has_a_name() -> None:
    assert list(report.VARIANTS) == ["base", "off-x", "on-x", "off", "on"]
    assert set(report.VARIANTS) == set(VARIANTS)


def test_outputs_agree_where_first_tokens_were_as_likely() -> None:
    same = [[1, -1.0], [9, -2.0]]
    one = {"tokens": [[1, 2], [3, 4], [1, 6]], "first_two": [same, [[3, -1.0], [7, -1.02]], same]}
    other = {"tokens": [[1, 2], [7, 4], [1, 0]], "first_two": [same, [[7, -1.0], [3, -1.1]], same]}
    agreed = agreement(one, other)
    assert (agreed["outputs"], agreed["equal"], agreed["first_equal"], agreed["far"]) == (3, 1, 2, 0)
    assert agreed["margins"] == pytest.approx([0.02])


def test_settings_survive_their_file(tmp_path: Path) -> None:
    settings = Settings(layers=4, engine={"quantization": "fp8"})
    settings.write(tmp_path / "settings.json")
    assert Settings.read(tmp_path / "settings.json") == settings
    assert json.loads(json.dumps(model(4)))["num_hidden_layers"] == 4
