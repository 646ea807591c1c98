"""Triton's compilations, in parallel and ahead of the measurements.

Triton compiles a kernel for each combination of its constants, 0.3 to 2.6 seconds each, and keeps the
result in a folder. Here several processes make the calls that the benchmark will make, once each and on
memory that nobody filled, so that the measuring process finds everything there.
"""

from __future__ import annotations

import os
import sys
from concurrent.futures import ProcessPoolExecutor
from functools import cache
from multiprocessing import get_context
from pathlib import Path
from typing import TYPE_CHECKING

from .cases import Case
from .records import Sink
from .vllm_defaults import tuned_blocks

if TYPE_CHECKING:
    from .peers import Vllm

#: Processes; each has a CUDA context of half a gigabyte.
PROCESSES = max(1, min(14, (os.cpu_count() or 1) - 1))


def run(sink: Sink, cases: list[Case], peers: Path) -> None:
    """Compiles what the peers need for these cases, as they ship and at every block size."""
    begun = sink.seconds

    # One task for each set of constants that may differ, as far as it is known from here: then no two
    # processes compile the same kernel.
    tasks: dict[tuple[object, ...], list[tuple[Case, int | None]]] = {}
    for case in cases:
        for name in ("pr32770", "vllm033"):
            for block in (None, *tuned_blocks(case)):
                key = (name, case.model.name, case.op, case.rank, case.dtype, case.tokens > 64, block)
                tasks.setdefault(key, []).append((case, block))
    work = [(str(peers), str(key[0]), calls) for key, calls in tasks.items()]
    # The longest first: what is left for the end is short.
    work.sort(key=lambda task: -len(task[2]))
    with ProcessPoolExecutor(PROCESSES, mp_context=get_context("spawn")) as pool:
        calls = sum(pool.map(_compile, work))
    sink.write("precompile", f"compiled for {calls} calls", calls=calls, seconds=sink.seconds - begun)


def _compile(task: tuple[str, str, list[tuple[Case, int | None]]]) -> int:
    import torch

    from .data import Projection, Routing, Weights

    folder, name, calls = task
    vllm = _vllm(folder)
    for case, block in calls:
        try:
            routing = Routing(case)
            routing.draw(0)
            projection = Projection(case, routing, Weights.blank(case))
            vllm.peer(name, routing, case.rank, block).routed(projection, 0)
            torch.cuda.synchronize()
        except Exception as error:  # The benchmark meets it again, and reports it.
            print(f"precompile {name} {block} {case.describe()}: {error!r:.200}", file=sys.stderr)
    torch.cuda.empty_cache()
    return len(calls)


@cache
def _vllm(folder: str) -> Vllm:
    """vLLM's operators, loaded once in each process."""
    from .peers import Vllm

    return Vllm(Path(folder))
