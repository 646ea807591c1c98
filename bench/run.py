"""The benchmark, part by part."""

from __future__ import annotations

import platform
import subprocess
from collections.abc import Callable, Sequence
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from . import cases, dense, first, measure, operator_runs, pairing, precompile, replay
from .cases import Case
from .floors import Ceilings
from .peers import Vllm
from .records import Sink

#: What can be measured, in this order.
PARTS = ("first", "cases", "layers", "routes", "dense", "replay")
#: What is measured only where it is asked for: this project with itself.
PAIRING = "table"


def run(
    path: Path, peers: Path | None, chosen: Sequence[Case] | None, quick: bool, parts: Sequence[str]
) -> int:
    """Measures ``parts`` and writes JSON lines to ``path``; returns how many results failed.

    ``chosen`` replaces the list of cases; ``peers`` is the folder that ``python -m bench.fetch`` filled.
    """
    sink = Sink(path)
    ceilings = measure.ceilings()
    torch.cuda.empty_cache()
    sink.write(
        "machine",
        f"{torch.cuda.get_device_name()}: copy {ceilings.bandwidth / 1e12:.2f} TB/s, "
        f"bf16 matmul {ceilings.operations / 1e12:.0f} TFLOP/s",
        partial=quick or chosen is not None or set(parts) != set(PARTS),
        **_machine(ceilings),
    )
    listed = list(chosen) if chosen is not None else cases.quick() if quick else cases.everything()
    if PAIRING in parts:
        _pair(sink, listed, ceilings)
    if peers is not None and set(parts) & set(PARTS):
        _beside_peers(sink, peers, listed, quick, parts, ceilings)
    sink.write("end", f"{sink.failures} results failed", seconds=sink.seconds, failures=sink.failures)
    return sink.failures


def _pair(sink: Sink, listed: Sequence[Case], ceilings: Ceilings) -> None:
    both = pairing.Pairing(sink, ceilings)
    for case in sorted(listed, key=operator_runs.Shelf.order):
        guard(sink, case.describe(), partial(both.run_case, case))
    both.finish()


def _beside_peers(
    sink: Sink, peers: Path, listed: Sequence[Case], quick: bool, parts: Sequence[str], ceilings: Ceilings
) -> None:
    # Before anything else is compiled or runs beside it.
    if "first" in parts:
        first.run(sink, peers)
    # Before vLLM's other operators are loaded, which share the stand-ins for vLLM's modules.
    if "dense" in parts:
        _dense(sink, peers, quick, ceilings)
        torch.cuda.empty_cache()
    if not set(parts) - {PAIRING, "first", "dense"}:
        return

    layers = cases.layers(quick)
    needed = [
        *(listed if "cases" in parts else ()),
        *(case for pair in layers if "layers" in parts for case in pair),
        *(replay.cases(quick) if "replay" in parts else ()),
    ]
    precompile.run(sink, list(dict.fromkeys(needed)), peers)

    vllm = Vllm(peers)
    if "cases" in parts:
        shelf = operator_runs.Shelf()
        for case in sorted(listed, key=shelf.order):
            guard(sink, case.describe(), partial(operator_runs.run_case, sink, vllm, shelf, case, ceilings))
        shelf.clear()
    if "layers" in parts:
        for w13, w2 in layers:
            what = f"layer of {w13.tokens} tokens"
            guard(sink, what, partial(operator_runs.run_layer, sink, vllm, w13, w2, ceilings))
            torch.cuda.empty_cache()
    if "routes" in parts:
        for case in cases.routes(quick):
            what = f"route of {case.pairs} pairs"
            guard(sink, what, partial(operator_runs.run_route, sink, vllm, case))
    if "replay" in parts:
        guard(sink, "replay", partial(replay.run, sink, vllm, quick))


def _dense(sink: Sink, peers: Path, quick: bool, ceilings: Ceilings) -> None:
    pair, missing = dense.load(peers)
    shelf = dense.Shelf(pair)
    for case in cases.dense(quick):
        work = partial(dense.run_case, sink, shelf, missing, case, ceilings)
        guard(sink, f"dense {case.describe()}", work)


def guard(sink: Sink, what: str, work: Callable[[], None]) -> None:
    """Does the work; what it fails with is a record, and the rest goes on."""
    _, fault = operator_runs.attempt(work)
    if fault is not None:
        sink.write("fault", f"{what} FAILED: {fault}", what=what, results={"all": {"failed": fault}})


def _machine(ceilings: Ceilings) -> dict[str, Any]:
    device = torch.cuda.get_device_properties(0)
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    driver = subprocess.run(query, capture_output=True, text=True, check=False).stdout.split()
    return {
        "device": device.name,
        "driver": driver[0] if driver else "unknown",
        "multiprocessors": device.multi_processor_count,
        "l2_bytes": device.L2_cache_size,
        "bandwidth": ceilings.bandwidth,
        "operations": ceilings.operations,
        "versions": {
            "torch": torch.__version__,
            "triton": metadata.version("triton"),
            "CUDA": torch.version.cuda,
            "Python": platform.python_version(),
        },
    }
