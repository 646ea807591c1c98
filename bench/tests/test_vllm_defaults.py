"""vLLM's launch configurations, by hand."""

from __future__ import annotations

import pytest

from bench.cases import QWEN3, Case
from bench.vllm_defaults import BLOCK_SIZES, default_block_m, default_config, tuned_blocks


@pytest.mark.parametrize(
    ("tokens", "block"), [(1, 16), (32, 16), (33, 32), (96, 32), (97, 64), (512, 64), (513, 128)]
)
def test_block_sizes_grow_with_tokens(tokens: int, block: int) -> None:
    assert default_block_m(tokens) == block


@pytest.mark.parametrize(
    ("tokens", "rank", "kernel", "config"),
    [
        # BLOCK_SIZE_M, _N, _K, GROUP_SIZE_M, warps, stages, SPLIT_K
        (80, 64, "shrink", [32, 64, 64, 1, 4, 3, 1]),
        (80, 64, "expand", [32, 128, 64, 1, 4, 3, 1]),
        (16, 8, "shrink", [16, 8, 128, 1, 4, 3, 1]),
        (16, 8, "expand", [16, 64, 16, 1, 4, 3, 1]),
        (16, 48, "expand", [16, 64, 64, 1, 4, 3, 1]),
        (65536, 128, "shrink", [128, 128, 64, 16, 4, 3, 1]),
    ],
)
def test_configurations(tokens: int, rank: int, kernel: str, config: list[int]) -> None:
    assert default_config(tokens, 128, rank, kernel) == config


def test_nothing_is_tuned_where_pairs_stay_unsorted() -> None:
    # Eight pairs a token against 2 · 128 segments: sorted from five tokens on.
    assert tuned_blocks(Case(QWEN3, "w13", 4, rank=64, adapters=2)) == ()
    assert tuned_blocks(Case(QWEN3, "w13", 5, rank=64, adapters=2)) == BLOCK_SIZES
