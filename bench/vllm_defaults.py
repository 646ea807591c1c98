"""What vLLM launches its operators with where it has no tuned file. Needs neither torch nor a GPU."""

from __future__ import annotations

from .cases import Case

#: Block sizes that a tuned configuration could choose from.
BLOCK_SIZES = (16, 32, 64, 128)
#: vLLM routes nothing when it has so many times more (adapter, expert) than pairs.
SPARSITY = 8


def default_block_m(tokens: int) -> int:
    """BLOCK_SIZE_M that vLLM takes where it has no tuned file."""
    return 16 if tokens <= 32 else 32 if tokens <= 96 else 64 if tokens <= 512 else 128


def default_config(tokens: int, experts: int, rank: int, kernel: str) -> list[int]:
    """BLOCK_SIZE_M, _N, _K, GROUP_SIZE_M, warps, stages and SPLIT_K where vLLM has no tuned file.

    It reads warps and stages by names in capitals that its defaults leave out, so they stay at 4 and 3.
    """
    n, k = (64, 128) if tokens <= 64 else (128, 64)
    padded_rank = 1 << (rank - 1).bit_length()
    if kernel == "shrink":
        n = min(n, padded_rank)
    else:
        k = max(16, min(k, padded_rank))
    group = 16 if tokens // max(experts, 1) > 128 else 1
    return [default_block_m(tokens), n, k, group, 4, 3, 1]


def is_naive(tokens: int, top_k: int, experts: int, adapters: int) -> bool:
    """Whether vLLM leaves pairs unsorted, a block of the grid for each, and does without a routing step."""
    return tokens * top_k * SPARSITY <= experts * adapters


def tuned_blocks(case: Case) -> tuple[int, ...]:
    """The block sizes to try for a case: none where pairs stay unsorted and there is nothing to choose."""
    model = case.model
    naive = is_naive(case.tokens, model.top_k, model.experts, case.adapters)
    return () if naive else BLOCK_SIZES
