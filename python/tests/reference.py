"""The operator in PyTorch's words, in float32, and random calls of it."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

TOLERANCE = {torch.bfloat16: 3e-3, torch.float16: 6e-4}
"""Largest relative error (Frobenius, over the delta) against this reference."""


@dataclass
class Case:
    """Sizes of a call, named as in the operator's contract, and its tensors."""

    tokens: int
    top_k: int = 8
    experts: int = 16
    slots: int = 3
    rank: int = 16
    slices: int = 2
    in_dim: int = 128
    out_dim: int = 96
    dtype: torch.dtype = torch.bfloat16
    x_rows: str = "token"
    shared_a: bool = False
    seed: int = 1
    without_adapter: float = 0.2
    device: str = "cuda"
    x: torch.Tensor = field(init=False)
    a: list[torch.Tensor] = field(init=False)
    b: list[torch.Tensor] = field(init=False)
    topk_ids: torch.Tensor = field(init=False)
    topk_weights: torch.Tensor = field(init=False)
    token_lora: torch.Tensor = field(init=False)
    base: torch.Tensor = field(init=False)

    def __post_init__(self) -> None:
        generator = torch.Generator(self.device).manual_seed(self.seed)

        def normal(*shape: int, scale: float = 1.0) -> torch.Tensor:
            values = torch.randn(*shape, generator=generator, device=self.device) * scale
            return values.to(self.dtype)

        pairs = self.tokens * self.top_k
        self.x = normal(self.tokens if self.x_rows == "token" else pairs, self.in_dim)
        a_experts = 1 if self.shared_a else self.experts
        self.a = [
            normal(self.slots, a_experts, self.rank, self.in_dim, scale=self.in_dim**-0.5)
            for _ in range(self.slices)
        ]
        self.b = [
            normal(self.slots, self.experts, self.out_dim, self.rank, scale=self.rank**-0.5)
            for _ in range(self.slices)
        ]
        self.base = normal(self.tokens, self.top_k, self.slices * self.out_dim)
        self.route(self.seed)

    def route(self, seed: int) -> None:
        """Other routing, in place where there is one already."""
        generator = torch.Generator().manual_seed(seed)
        shape = (self.tokens, self.experts)
        ids = torch.rand(shape, generator=generator).argsort(dim=1)[:, : self.top_k].to(torch.int32)
        weights = torch.rand((self.tokens, self.top_k), generator=generator) + 0.1
        lora = torch.randint(0, self.slots, (self.tokens,), generator=generator, dtype=torch.int32)
        lora[torch.rand(self.tokens, generator=generator) < self.without_adapter] = -1
        new = [ids.contiguous().to(self.device), weights.to(self.device), lora.to(self.device)]
        if hasattr(self, "topk_ids"):
            for old, value in zip([self.topk_ids, self.topk_weights, self.token_lora], new, strict=True):
                old.copy_(value)
        else:
            self.topk_ids, self.topk_weights, self.token_lora = new

    def delta(
        self,
        *,
        mul_routed_weight: bool = False,
        adapter_enabled: torch.Tensor | None = None,
        ranks: torch.Tensor | None = None,
        expert_map: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """The update of every pair, ``[T, k, S·N]`` in float32: zero where a pair is inactive."""
        out = torch.zeros(self.tokens * self.top_k, self.slices * self.out_dim, device=self.device)
        experts = self.topk_ids if expert_map is None else expert_map[self.topk_ids.long()]
        experts = experts.reshape(-1)
        slots = self.token_lora.repeat_interleave(self.top_k)
        for slot in range(self.slots):
            if adapter_enabled is not None and not bool(adapter_enabled[slot]):
                continue
            rank = self.rank if ranks is None else int(ranks[slot])
            for expert in torch.unique(experts).tolist():
                pairs = torch.nonzero((slots == slot) & (experts == expert)).reshape(-1)
                if expert < 0 or pairs.numel() == 0:
                    continue
                rows = pairs if self.x_rows == "pair" else pairs // self.top_k
                x = self.x[rows].float()
                for s in range(self.slices):
                    a = self.a[s][slot, 0 if self.shared_a else expert, :rank].float()
                    b = self.b[s][slot, expert, :, :rank].float()
                    out[pairs, s * self.out_dim : (s + 1) * self.out_dim] = x @ a.T @ b.T
        if mul_routed_weight:
            out *= self.topk_weights.reshape(-1, 1)
        return out.reshape(self.tokens, self.top_k, -1)

    def active(self) -> torch.Tensor:
        """``[T]``: which tokens have an adapter."""
        return self.token_lora >= 0


def blocks(case: Case, block_size: int, max_padded: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """What vLLM's ``moe_lora_align_block_size`` leaves: sorted_token_ids, expert_ids,
    num_tokens_post_padded."""
    pairs = case.tokens * case.top_k
    max_blocks = -(-max_padded // block_size)
    sorted_ids = torch.full((case.slots, max_padded), pairs, dtype=torch.int32)
    expert_ids = torch.full((case.slots, max_blocks), -1, dtype=torch.int32)
    padded = torch.zeros(case.slots, dtype=torch.int32)
    ids, lora = case.topk_ids.reshape(-1).cpu(), case.token_lora.repeat_interleave(case.top_k).cpu()
    for slot in range(case.slots):
        place = 0
        for expert in range(case.experts):
            segment = torch.nonzero((lora == slot) & (ids == expert)).reshape(-1).to(torch.int32)
            sorted_ids[slot, place : place + len(segment)] = segment
            after = place + -(-len(segment) // block_size) * block_size
            expert_ids[slot, place // block_size : after // block_size] = expert
            place = after
        padded[slot] = place
    return sorted_ids.to(case.device), expert_ids.to(case.device), padded.to(case.device)


def check(got: torch.Tensor, expected: torch.Tensor) -> None:
    """Fails when a result differs from the reference by more than its type's tolerance."""
    tolerance = TOLERANCE[got.dtype]
    got, expected = got.float(), expected.float()
    assert torch.isfinite(got).all(), "a value is not finite"
    scale = float(expected.norm())
    error = float((got - expected).norm()) / (scale or 1.0)
    assert error <= tolerance, f"relative error {error:.2e}, expected {tolerance:.0e} at most"
