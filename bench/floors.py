"""The fewest bytes and operations that a call can do with. Needs neither torch nor a GPU."""

from __future__ import annotations

from dataclasses import dataclass

from .cases import Case, DenseCase

#: Bytes of a bf16 or f16 element.
ELEMENT = 2


@dataclass(frozen=True)
class Ceilings:
    """What the machine reaches, measured in the same run."""

    #: Bytes a second of a large copy, reads and writes together.
    bandwidth: float
    #: Operations a second of a large bf16 matrix product.
    operations: float


@dataclass(frozen=True)
class Floor:
    """What a call cannot do without."""

    #: Each touched weight once, x once, out read and written.
    bytes: int
    #: Multiplications and additions of both products.
    operations: int

    def microseconds(self, ceilings: Ceilings) -> float:
        """The time below which no implementation can go."""
        return 1e6 * max(self.bytes / ceilings.bandwidth, self.operations / ceilings.operations)


def floor(case: Case, segments: int) -> Floor:
    """The floor of a case whose pairs use that many different (adapter, expert)."""
    matrices = case.used_rank * (case.k + case.n) * case.slices
    out = case.pairs * case.n * case.slices
    elements = segments * matrices + case.x_rows * case.k + 2 * out
    return Floor(bytes=elements * ELEMENT, operations=2 * case.pairs * matrices)


def dense_floor(case: DenseCase, adapters: int) -> Floor:
    """The floor of a dense layer's case whose tokens use that many adapters."""
    elements = adapters * case.matrices + case.tokens * (case.in_dim + 2 * case.width)
    return Floor(bytes=elements * ELEMENT, operations=2 * case.tokens * case.matrices)
