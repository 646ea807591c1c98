"""This project, through its Python package."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, TypedDict

from torch import Tensor

from .data import Projection, Routing
from .peers import Operator, Peer

if TYPE_CHECKING:
    import moe_lora


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

    def weights(self, projection: Projection, chosen: int) -> dict[str, Any]:
        """What the call is given of a set of weights."""
        return {"a": projection.weights.a[chosen], "b": projection.weights.b[chosen]}

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
            **self.weights(projection, chosen),
            topk_ids=topk_ids,
            token_lora=token_lora,
            out=projection.out,
            ranks=ranks,
            topk_weights=self.routing.topk_weights if projection.weighted else None,
            mul_routed_weight=projection.weighted,
            accumulate=accumulate,
            workspace=self.workspace,
        )


class OnTables(Ours):
    """The same on adapters by address: a table for each set of weights, which names them where they are."""

    def __init__(self, routing: Routing, rank: int, projection: Projection) -> None:
        super().__init__(routing, rank)
        case = projection.case
        self.tables = [
            table_of(a, b, out_dims=[case.n] * case.slices, in_dim=case.k, max_rank=rank, rank=case.used_rank)
            for a, b in zip(projection.weights.a, projection.weights.b, strict=True)
        ]

    def weights(self, projection: Projection, chosen: int) -> dict[str, Any]:
        """What the call is given of a set of weights."""
        return {"table": self.tables[chosen]}


def table_of(
    a: list[Tensor], b: list[Tensor], *, out_dims: list[int], in_dim: int, max_rank: int, rank: int
) -> moe_lora.AdapterTable:
    """A table that names the slots of stacked weights, ``[adapters, experts, …]``."""
    import moe_lora

    slots, experts = a[0].shape[:2]
    table = moe_lora.AdapterTable(
        slots,
        out_dims=out_dims,
        in_dim=in_dim,
        experts=experts,
        dtype=a[0].dtype,
        device=a[0].device,
        max_rank=max_rank,
    )
    for slot in range(slots):
        table.set(slot, [matrix[slot] for matrix in a], [matrix[slot] for matrix in b], rank=rank)
    return table
