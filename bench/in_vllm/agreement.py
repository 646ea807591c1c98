"""How far the outputs of two engines agree."""

from __future__ import annotations

from typing import Any

from ..records import Record

#: Two first tokens whose log probabilities are this close may change places by rounding alone.
CLOSE = 0.05


def agreement(one: Record, other: Record) -> dict[str, Any]:
    """How far two variants' greedy outputs agree.

    Where first tokens differ, ``margins`` says how far apart the two best were in the first variant.
    """
    pairs = list(zip(one["tokens"], other["tokens"], strict=True))
    firsts = list(zip(one["first_two"], other["first_two"], strict=True))
    margins = [ours[0][1] - ours[1][1] for ours, theirs in firsts if ours[0][0] != theirs[0][0]]
    return {
        "outputs": len(pairs),
        "equal": sum(mine == theirs for mine, theirs in pairs),
        "first_equal": len(firsts) - len(margins),
        "margins": margins,
        "far": sum(margin >= CLOSE for margin in margins),
    }
