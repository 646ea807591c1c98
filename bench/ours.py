"""This project, through its Python package."""

from __future__ import annotations

from typing import TypedDict

from torch import Tensor

from .data import Projection, Routing
from .peers import Operator, Peer


def stand_in(routing: Routing, rank: int) -> Peer:
    """The package's operators with vLLM's arguments, called as vLLM would call its own."""
    import moe_lora.vllm as vllm

    operator = Operator(vllm.fused_moe_lora, vllm.moe_lora_align_block_size, upload=None)
    return Peer(operator, routing, rank, block_m=None)


class Sizes(TypedDict):
    """What a route is for."""

    experts: int
    slots: int
    max_rank: int


class Ours:
    """The operator on one routing, with a workspace of its own."""

    def __init__(self, routing: Routing, rank: int) -> None:
        # Here, since a package that cannot be imported is reported as failed, and its peers are measured.
        import moe_lora

        self.library, self.routing = moe_lora, routing
        self.sizes: Sizes = {"experts": routing.experts, "slots": routing.adapters, "max_rank": rank}
        self.workspace = moe_lora.Workspace(routing.tokens, top_k=routing.top_k, **self.sizes)

    def use(self, routing: Routing) -> None:
        """Another routing, of the same sizes, from the next call on."""
        self.routing = routing

    def prepare(self, *projections: Projection) -> None:
        """Loads the kernels, which the first call does."""
        for projection in projections:
            self.routed(projection, 0)

    def route(self) -> None:
        """The routing step alone."""
        routing = self.routing
        self.library.route(
            routing.topk_ids,
            routing.token_lora,
            ranks=routing.ranks,
            workspace=self.workspace,
            **self.sizes,
        )

    def forward(self, projection: Projection, chosen: int, accumulate: bool = True) -> None:
        """Both products, on the route that the workspace keeps."""
        self._call(projection, chosen, None, None, None, accumulate)

    def routed(self, projection: Projection, chosen: int) -> None:
        """Routing and both products, in one call."""
        routing = self.routing
        self._call(projection, chosen, routing.topk_ids, routing.token_lora, routing.ranks, True)

    def _call(
        self,
        projection: Projection,
        chosen: int,
        topk_ids: Tensor | None,
        token_lora: Tensor | None,
        ranks: Tensor | None,
        accumulate: bool,
    ) -> None:
        self.library.forward(
            projection.x,
            projection.weights.a[chosen],
            projection.weights.b[chosen],
            topk_ids,
            token_lora,
            projection.out,
            ranks=ranks,
            topk_weights=self.routing.topk_weights if projection.weighted else None,
            mul_routed_weight=projection.weighted,
            accumulate=accumulate,
            workspace=self.workspace,
        )
