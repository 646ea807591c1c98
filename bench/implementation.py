"""What the benchmark asks of an implementation; :mod:`bench.ours` and :mod:`bench.peers` have them."""

from __future__ import annotations

from typing import Protocol

from .data import Projection, Routing


class Implementation(Protocol):
    """The operator on one routing, as an engine would hold it for one number of tokens."""

    def use(self, routing: Routing) -> None:
        """Another routing, of the same sizes, from the next call on."""

    def prepare(self, *projections: Projection) -> None:
        """Sets up what a call inside the capture of a graph could not."""

    def route(self) -> None:
        """The routing step alone."""

    def forward(self, projection: Projection, chosen: int) -> None:
        """Both products with one set of weights, on the routing that was read last, added to ``out``."""

    def routed(self, projection: Projection, chosen: int) -> None:
        """Routing and both products."""
