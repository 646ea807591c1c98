"""vLLM's own code in the place of these kernels, and the one warning that says so.

A ``ValueError`` of the kernels means that nothing was launched or written: whoever was asked can still be
answered by vLLM's own operator. A request never ends for it.
"""

import functools
import logging
from collections.abc import Callable
from typing import Any

#: Below vLLM's own logger, whose handlers print it.
LOGGER = logging.getLogger("vllm.moe_lora")

#: vLLM's own operators by name, since these stand in their places.
THEIRS: dict[str, Callable[..., None]] = {}

_WARNED: set[tuple[str, str]] = set()


def warn(what: str, why: object) -> None:
    """Says once what vLLM's own code does from now on, and why."""
    if (what, str(why)) not in _WARNED:
        _WARNED.add((what, str(why)))
        LOGGER.warning("moe_lora leaves %s to vLLM: %s", what, why)


def guard(name: str, function: Callable[..., None]) -> Callable[..., None]:
    """The operator, or vLLM's own of this name for what the operator refuses. Without vLLM: the refusal."""

    @functools.wraps(function)
    def guarded(*args: Any, **kwargs: Any) -> None:
        try:
            function(*args, **kwargs)
        except ValueError as refusal:
            theirs = THEIRS.get(name)
            if theirs is None:
                raise
            warn(name, refusal)
            theirs(*args, **kwargs)

    return guarded
