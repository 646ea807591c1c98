"""Whether this machine can measure: ``python -m bench.probe`` says what is missing, or nothing."""

from __future__ import annotations

import importlib
import sys


def missing() -> str | None:
    """What is missing, in a line."""
    for module in ("torch", "triton"):
        try:
            importlib.import_module(module)
        except ImportError as error:
            return f"{sys.executable}: {error}"
    import torch

    return None if torch.cuda.is_available() else "PyTorch finds no GPU"


if __name__ == "__main__":
    sys.exit(missing())
