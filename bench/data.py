"""A case's tensors, and what the operator must compute from them."""

from __future__ import annotations

from copy import copy
from dataclasses import dataclass, replace

import torch

from .cases import Case

DTYPES = {"bf16": torch.bfloat16, "f16": torch.float16}
#: Sequences of a batch; all tokens of one use the same adapter.
SEQUENCES = 16
#: In a checked batch every eighth token has no adapter.
BARE_TOKENS = 8
#: The weights that one round of calls touches, in multiples of the L2 cache: no call finds its own there.
ROTATION = 3
#: Most sets of weights, and most bytes of them. Those of a dense layer are small: one token of one adapter
#: touches 0.8 MB.
MAX_SETS, MAX_BYTES = 256, 24e9


class Routing:
    """Which experts and which adapter each token uses; drawn anew in place, for graphs hold its addresses."""

    def __init__(self, case: Case) -> None:
        tokens, top_k = case.tokens, case.model.top_k
        self.tokens, self.top_k = tokens, top_k
        self.experts, self.adapters = case.model.experts, case.adapters
        self.kind = case.routing
        #: [tokens, top_k] i32.
        self.topk_ids = torch.empty(tokens, top_k, dtype=torch.int32, device="cuda")
        #: [tokens, top_k] f32, which sum to one for each token.
        self.topk_weights = torch.empty(tokens, top_k, dtype=torch.float32, device="cuda")
        #: [tokens] i32, -1 for none.
        self.token_lora = torch.empty(tokens, dtype=torch.int32, device="cuda")
        #: [adapters] i32: the rank in use of each; None: all that the weights are allocated for.
        self.ranks = None
        if case.own_rank is not None:
            self.ranks = torch.full((case.adapters,), case.own_rank, dtype=torch.int32, device="cuda")

    @staticmethod
    def over(
        case: Case, topk_ids: torch.Tensor, topk_weights: torch.Tensor, token_lora: torch.Tensor
    ) -> Routing:
        """A routing on tensors that are there already."""
        routing = Routing(case)
        routing.topk_ids, routing.topk_weights, routing.token_lora = topk_ids, topk_weights, token_lora
        return routing

    def draw(self, seed: int, bare_tokens: bool = False) -> None:
        """Random choices; with ``bare_tokens`` some tokens have no adapter."""
        random = torch.Generator("cuda").manual_seed(seed)
        scores = torch.rand(self.tokens, self.experts, generator=random, device="cuda")
        if self.kind == "zipf":
            # The largest of u^(1/w) are a weighted draw without replacement.
            share = 1.0 / torch.arange(1, self.experts + 1, device="cuda")
            scores = scores.pow(1.0 / share[torch.randperm(self.experts, generator=random, device="cuda")])
        if self.kind == "half":
            scores[::2, 0] = 2.0
        self.topk_ids.copy_(scores.topk(self.top_k, sorted=False).indices)
        weights = torch.rand(self.tokens, self.top_k, generator=random, device="cuda") + 0.05
        self.topk_weights.copy_(weights / weights.sum(1, keepdim=True))
        self.token_lora.copy_(adapters_of(self.tokens, self.adapters))
        if bare_tokens:
            self.token_lora[BARE_TOKENS - 1 :: BARE_TOKENS] = -1

    def keys(self) -> torch.Tensor:
        """For each pair its segment, adapter · experts + expert; -1 where the pair is inactive."""
        adapter = self.token_lora.long().repeat_interleave(self.top_k)
        return torch.where(adapter < 0, -1, adapter * self.experts + self.topk_ids.flatten())

    def segments(self) -> int:
        """Different segments in use."""
        keys = self.keys()
        return int(torch.unique(keys[keys >= 0]).numel())


Matrices = list[torch.Tensor]


@dataclass
class Weights:
    """Sets of stacked adapter weights, as the layers of a model have them."""

    #: For each set and slice: [adapters, experts, rank, k].
    a: list[Matrices]
    #: For each set and slice: [adapters, experts, n, rank].
    b: list[Matrices]

    @staticmethod
    def draw(case: Case, sets: int) -> Weights:
        """Normal values, scaled so that h and the delta are about 1."""
        adapters, experts, dtype = case.adapters, case.model.experts, DTYPES[case.dtype]

        def stack(*shape: int, scale: float) -> torch.Tensor:
            return torch.randn(adapters, experts, *shape, device="cuda", dtype=dtype).mul_(scale)

        def slices(*shape: int, scale: float) -> Matrices:
            return [stack(*shape, scale=scale) for _ in range(case.slices)]

        weights = Weights(
            a=[slices(case.rank, case.k, scale=case.k**-0.5) for _ in range(sets)],
            b=[slices(case.n, case.rank, scale=case.used_rank**-0.5) for _ in range(sets)],
        )
        if case.own_rank is not None:
            # Peers compute with the whole allocation, which engines keep zero beyond the adapter's rank.
            for a, b in zip(weights.a, weights.b, strict=True):
                for matrix in a:
                    matrix[:, :, case.own_rank :] = 0
                for matrix in b:
                    matrix[..., case.own_rank :] = 0
        return weights

    @staticmethod
    def blank(case: Case) -> Weights:
        """One set in memory that nobody filled."""
        stack = (case.adapters, case.model.experts)

        def slices(*shape: int) -> Matrices:
            dtype = DTYPES[case.dtype]
            return [torch.empty(*stack, *shape, device="cuda", dtype=dtype) for _ in range(case.slices)]

        return Weights(a=[slices(case.rank, case.k)], b=[slices(case.n, case.rank)])


def set_bytes(case: Case) -> int:
    """Bytes of one set of weights."""
    return case.adapters * case.model.experts * case.rank * (case.k + case.n) * case.slices * 2


def sets_needed(case: Case, segments: int) -> int:
    """Sets of weights in the rotation, so that what a round touches is larger than the L2 cache."""
    return rotation_of(segments * case.used_rank * (case.k + case.n) * case.slices * 2, set_bytes(case))


def rotation_of(touched: int, whole: int) -> int:
    """Sets in the rotation, where a call touches so many bytes of one that is so large."""
    cache: int = torch.cuda.get_device_properties(0).L2_cache_size
    most = max(2, min(MAX_SETS, int(MAX_BYTES / whole)))
    return max(2, min(most, -(-ROTATION * cache // touched)))


def adapters_of(tokens: int, adapters: int) -> torch.Tensor:
    """``[tokens]`` i32: the adapter of each, one for all tokens of a sequence."""
    run = -(-tokens // SEQUENCES)
    return (torch.arange(tokens, device="cuda") // run % adapters).to(torch.int32)


class Projection:
    """One projection of a layer: its operands, and what must come out of them."""

    def __init__(self, case: Case, routing: Routing, weights: Weights) -> None:
        self.case, self.routing, self.weights = case, routing, weights
        dtype = DTYPES[case.dtype]
        #: [tokens or pairs, k].
        self.x = torch.randn(case.x_rows, case.k, device="cuda", dtype=dtype)
        #: [tokens, top_k, slices · n].
        self.out = torch.zeros(
            case.tokens, case.model.top_k, case.slices * case.n, device="cuda", dtype=dtype
        )

    def part(self, tokens: int, routing: Routing) -> Projection:
        """The first tokens' part of the operands, with a routing of theirs."""
        part = copy(self)
        part.case, part.routing = replace(self.case, tokens=tokens), routing
        part.x, part.out = self.x[: part.case.x_rows], self.out[:tokens]
        return part

    @property
    def weighted(self) -> bool:
        """Whether the routed weight is multiplied in: it is where the experts' outputs leave the layer."""
        return self.case.op == "w2"

    def reference(self, chosen: int) -> torch.Tensor:
        """The delta in float32, [tokens, top_k, slices · n], with one set of weights."""
        case, experts, top_k = self.case, self.case.model.experts, self.case.model.top_k
        delta = torch.zeros(case.pairs, case.slices * case.n, device="cuda")
        keys, order = self.routing.keys().sort(stable=True)
        found, counts = torch.unique_consecutive(keys, return_counts=True)
        for key, pairs in zip(found.tolist(), order.split(counts.tolist()), strict=True):
            if key < 0:
                continue
            adapter, expert = divmod(key, experts)
            x = self.x[pairs if case.op == "w2" else pairs // top_k].float()
            parts = [
                x @ a[adapter, expert].float().T @ b[adapter, expert].float().T
                for a, b in zip(self.weights.a[chosen], self.weights.b[chosen], strict=True)
            ]
            delta[pairs] = torch.cat(parts, dim=1)
        if self.weighted:
            delta *= self.routing.topk_weights.reshape(-1, 1)
        return delta.view_as(self.out)
