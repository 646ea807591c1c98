#!/usr/bin/env python3
"""Host time of a call outside a graph, and time to the first result in a fresh process: JSON on stdout.

    python3 host_time.py [--calls N]

Host time is what a call costs the thread that makes it: calls are made in batches that the stream can hold,
timed without waiting for the device. The first result is timed in a process of its own, from ``import
moe_lora`` to the end of the first call's work, with PyTorch imported and its context made before; once as on
a machine that has never run these kernels (the driver's cache of compiled kernels is off), and then as found.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from functools import partial

#: Calls that are made one after another: few enough for the driver to queue them all.
BATCH = 20
#: Batches of each kind that are not counted.
WARM_UP = 100

FIRST = """
import time, torch
T, k, E, L, R, K, N = 16, 8, 128, 2, 64, 2048, 768
bf16 = dict(dtype=torch.bfloat16, device="cuda")
x, out = torch.randn(T, K, **bf16), torch.zeros(T, k, 2 * N, **bf16)
a = [torch.randn(L, E, R, K, **bf16) for _ in range(2)]
b = [torch.randn(L, E, N, R, **bf16) for _ in range(2)]
ids = torch.randint(0, E, (T, k), dtype=torch.int32, device="cuda")
lora = torch.zeros(T, dtype=torch.int32, device="cuda")
torch.cuda.synchronize()
start = time.perf_counter()
import moe_lora
imported = time.perf_counter()
moe_lora.forward(x, a, b, ids, lora, out)
torch.cuda.synchronize()
print((imported - start) * 1e3, (time.perf_counter() - start) * 1e3)
"""


def first_result(**environment: str) -> dict[str, float]:
    """Milliseconds to the import and to the first result, in a fresh process."""
    command = [sys.executable, "-c", FIRST]
    run = subprocess.run(command, check=True, capture_output=True, text=True, env=os.environ | environment)
    imported, first = (float(word) for word in run.stdout.split())
    return {"import_ms": round(imported, 2), "first_result_ms": round(first, 2)}


def host_time(calls: int) -> dict[str, float]:
    """Median microseconds of host time a call."""
    import moe_lora
    import torch
    from reference import Case, blocks

    case = Case(8, top_k=8, experts=128, slots=2, rank=64, in_dim=2048, out_dim=768)
    on = torch.ones(2, dtype=torch.int32, device="cuda")
    tensors = (case.x, case.a, case.b, case.topk_ids, case.token_lora, case.base)
    workspace = moe_lora.Workspace(8, top_k=8, experts=128, slots=2, max_rank=64)
    weights = dict(topk_weights=case.topk_weights, mul_routed_weight=True)
    kinds = {
        "forward": lambda: moe_lora.forward(*tensors, adapter_enabled=on, **weights),
        "forward, own workspace": lambda: moe_lora.forward(
            *tensors, adapter_enabled=on, workspace=workspace, **weights
        ),
        "forward, kept route": lambda: moe_lora.forward(
            case.x, case.a, case.b, None, None, case.base, **weights
        ),
        "route": lambda: moe_lora.route(case.topk_ids, case.token_lora, experts=128, slots=2, max_rank=64),
    }
    try:
        import moe_lora.vllm as stand_in

        ids, flat = case.topk_ids.reshape(-1), [16, 64, 64, 8, 4, 3, 1] * 2
        active = torch.tensor([2], dtype=torch.int32)
        more = torch.ones(3, dtype=torch.int32, device="cuda")
        for form, arrays in [("naive", (None, ids, None)), ("sorted", blocks(case, 16, ids.numel() * 16))]:
            arguments = (
                case.base, case.x, case.a, case.b, case.topk_weights, *arrays, case.token_lora, 64, 8, more,
                active,
                more, *flat, False, False, 0, True,
            )  # fmt: skip
            kinds[f"vllm.fused_moe_lora, {form}"] = partial(stand_in.fused_moe_lora, *arguments)
            operator = torch.ops.moe_lora.fused_moe_lora.default
            kinds[f"the same through PyTorch's dispatcher, {form}"] = partial(operator, *arguments)
    except ImportError:
        pass
    # In turns, so that whatever the machine does meanwhile happens to all; the first rounds wake it up.
    times: dict[str, list[float]] = {name: [] for name in kinds}
    for _ in range(WARM_UP + calls // BATCH):
        for name, call in kinds.items():
            torch.cuda.synchronize()
            start = time.perf_counter()
            for _ in range(BATCH):
                call()
            times[name].append((time.perf_counter() - start) / BATCH * 1e6)
    torch.cuda.synchronize()
    return {name: round(statistics.median(of_kind[WARM_UP:]), 2) for name, of_kind in times.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--calls", type=int, default=2000, help="calls of each kind")
    calls = parser.parse_args().calls
    result = {
        "host_us": host_time(calls),
        "first_on_a_new_machine": first_result(CUDA_CACHE_DISABLE="1"),
        "first": [first_result() for _ in range(3)],
    }
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
