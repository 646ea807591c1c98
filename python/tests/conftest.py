"""Which tests need a GPU, and the list of those that were skipped."""

from __future__ import annotations

import importlib.util
import os

import pytest


def _no_gpu() -> str | None:
    """Why the tests on a GPU cannot run here, or None."""
    if importlib.util.find_spec("torch") is None:
        return "PyTorch is not installed"
    import torch

    return None if torch.cuda.is_available() else "no CUDA device"


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "gpu: needs PyTorch and a CUDA device")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if reason := _no_gpu():
        for item in items:
            if item.get_closest_marker("gpu") is not None:
                item.add_marker(pytest.mark.skip(reason=reason))


def _list_skipped(report: pytest.CollectReport | pytest.TestReport) -> None:
    """Adds a line to the file that `MOE_LORA_SKIP_LOG` names, as every suite of the project does."""
    log = os.environ.get("MOE_LORA_SKIP_LOG")
    if log and report.skipped and isinstance(report.longrepr, tuple):
        reason = report.longrepr[2].removeprefix("Skipped: ")
        with open(log, "a", encoding="utf-8") as file:
            print(f"python/{report.nodeid}: {reason}", file=file)


pytest_collectreport = _list_skipped
pytest_runtest_logreport = _list_skipped
