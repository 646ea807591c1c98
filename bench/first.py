"""The first result of a fresh process: ``python -m bench.first NAME PEERS`` is that process.

The clock starts when torch is imported, the GPU is in use and the tensors are there, and stops when the
first result is: in between lie the import of an implementation and its first call, with routing. Done
twice: with empty caches (Triton's, and the driver's for PTX), and with what the first process left there.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .cases import QWEN3, Case
from .records import Sink

if TYPE_CHECKING:
    from .implementation import Implementation

CASE = Case(QWEN3, "w13", 80, rank=64, adapters=2)
NAMES = ("ours", "pr32770", "vllm033")


def run(sink: Sink, peers: Path) -> None:
    """Two processes for each implementation, one after the other."""
    results: dict[str, Any] = {}
    for name in NAMES:
        with tempfile.TemporaryDirectory() as caches:
            empty = _in_fresh_process(name, peers, caches)
            filled = _in_fresh_process(name, peers, caches)
        fault = empty.get("failed") or filled.get("failed")
        results[name] = {"failed": fault} if fault else {"empty_ms": empty, "filled_ms": filled}
    line = ", ".join(
        f"{name} " + (r["failed"] if "failed" in r else f"{_sum(r['empty_ms'])}, {_sum(r['filled_ms'])} ms")
        for name, r in results.items()
    )
    sink.write(
        "first", f"first result with empty, filled caches: {line}", case=CASE.to_json(), results=results
    )


def _sum(parts: dict[str, float]) -> str:
    return f"{sum(parts.values()):.0f}"


def _in_fresh_process(name: str, peers: Path, caches: str) -> dict[str, Any]:
    environment = {**os.environ, "TRITON_CACHE_DIR": f"{caches}/triton", "CUDA_CACHE_PATH": f"{caches}/cuda"}
    command = [sys.executable, "-m", "bench.first", name, str(peers)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        return {"failed": done.stderr.strip()[-400:]}
    times: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return times


def _first_result(name: str, peers: Path) -> dict[str, float]:
    import torch

    from .data import Projection, Routing, Weights

    routing = Routing(CASE)
    routing.draw(0)
    projection = Projection(CASE, routing, Weights.draw(CASE, 1))
    torch.cuda.synchronize()
    begun = time.perf_counter()
    implementation: Implementation
    if name == "ours":
        import moe_lora  # noqa: F401

        from .ours import Ours

        imported = time.perf_counter()
        implementation = Ours(routing, CASE.rank)
    else:
        from .peers import Vllm

        vllm = Vllm(peers)
        imported = time.perf_counter()
        implementation = vllm.peer(name, routing, CASE.rank)
    implementation.routed(projection, 0)
    torch.cuda.synchronize()
    ended = time.perf_counter()
    return {"import": (imported - begun) * 1e3, "first call": (ended - imported) * 1e3}


if __name__ == "__main__":
    print(json.dumps(_first_result(sys.argv[1], Path(sys.argv[2]))))
