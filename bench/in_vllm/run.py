"""The variants, one after another, and what comes of them."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from ..records import Record, Sink, best_round
from . import adapters
from .agreement import agreement
from .settings import AGREEING, VARIANTS, Settings, model

#: Seconds that a variant may take.
LONGEST = 900
#: What an engine says of its outputs.
OUTPUTS = ("tokens", "first_two")

#: What vLLM needs to be told on a machine without a network.
ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_USE_FLASHINFER_SAMPLER": "0",
    "VLLM_WORKER_MULTIPROC_METHOD": "spawn",
    "VLLM_HOST_IP": "127.0.0.1",
    "GLOO_SOCKET_IFNAME": "lo",
    "NCCL_SOCKET_IFNAME": "lo",
}


def run(path: Path, kit: Path | None, variants: Sequence[str], settings: Settings) -> int:
    """Measures ``variants`` and writes JSON lines to ``path``; returns how many results failed.

    ``kit``: a folder whose ``site`` has a vLLM; without, the one that is installed.
    """
    import torch

    sink = Sink(path)
    versions = {"torch": torch.__version__, "vLLM": _version(kit)}
    name = torch.cuda.get_device_name()
    line = f"{name}: vLLM {versions['vLLM']}, torch {versions['torch']}"
    sink.write("machine", line, device=name, versions=versions, partial=True)
    found: dict[str, Record] = {}
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        _prepare(folder, settings, any(VARIANTS[variant][0] for variant in variants))
        sink.say("adapters are written")
        for variant in variants:
            record = _measure(folder, kit, variant, path.with_suffix(f".{variant}.log"))
            # What is compared is no part of the results.
            found[variant] = {name: record.pop(name) for name in OUTPUTS if name in record}
            line = f"{variant}: {_show(record)}"
            sink.write("vllm", line, variant=variant, settings=vars(settings), results={variant: record})
    for one, other in AGREEING:
        if found.get(one) and found.get(other):
            agreed = agreement(found[one], found[other])
            sink.write("agreement", f"{one} and {other}: {json.dumps(agreed)}", of=[one, other], **agreed)
    sink.write("end", f"{sink.failures} results failed", seconds=sink.seconds, failures=sink.failures)
    return sink.failures


def _prepare(folder: Path, settings: Settings, has_lora: bool) -> None:
    """What the engines read."""
    config = model(settings.layers)
    (folder / "model").mkdir()
    (folder / "model/config.json").write_text(json.dumps(config))
    settings.write(folder / "settings.json")
    if has_lora:
        for number in range(settings.adapters):
            adapters.write(folder / f"adapters/a{number}", number, settings.rank, config)
    # An entry point, by which each process of vLLM finds the dummy weights.
    info = folder / "plugin/moe_lora_bench-0.0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: moe-lora-bench\nVersion: 0.0\n")
    entry = "[vllm.general_plugins]\nmoe_lora_bench = bench.in_vllm.dummy_weights:install\n"
    (info / "entry_points.txt").write_text(entry)


def _path(folder: Path | None, kit: Path | None) -> str:
    """Where the engines find their modules: these, the kit's, and this process's."""
    first = [] if kit is None else [kit / "site"]
    own = [Path(__file__).resolve().parents[2], *([] if folder is None else [folder / "plugin"])]
    return os.pathsep.join(str(place) for place in [*first, *own, *filter(None, sys.path)])


def _version(kit: Path | None) -> str:
    ask = "from importlib import metadata; print(metadata.version('vllm'))"
    env = os.environ | {"PYTHONPATH": _path(None, kit)}
    done = subprocess.run([sys.executable, "-c", ask], env=env, capture_output=True, text=True, check=False)
    return done.stdout.strip() or "not found"


def _measure(folder: Path, kit: Path | None, variant: str, log: Path) -> Record:
    """One variant's record, or why it failed."""
    plugins = ["moe_lora_bench", *(["moe_lora"] if VARIANTS[variant][2] else [])]
    environment = {**os.environ, **ENVIRONMENT, "PYTHONPATH": _path(folder, kit)}
    environment |= {"VLLM_PLUGINS": ",".join(plugins), "PYTHONUNBUFFERED": "1"}
    command = [sys.executable, "-m", "bench.in_vllm.engine", str(folder), variant]
    with log.open("w") as file:
        # Its processes are a group of their own, of which none is to keep the GPU's memory afterwards.
        engine = subprocess.Popen(
            command, env=environment, stdout=file, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            engine.wait(LONGEST)
        except subprocess.TimeoutExpired:
            return {"failed": f"it took more than {LONGEST} s; {log} has its output"}
        finally:
            _end(engine.pid)
    result, lines = folder / f"{variant}.json", log.read_text(errors="replace").splitlines()
    if not result.is_file():
        errors = [line for line in lines if "Error" in line]
        return {"failed": f"{errors[-1] if errors else 'no result'}; {log} has its output"}
    record: Record = json.loads(result.read_text())
    mark = "moe_lora leaves"
    record["warnings"] = sorted({line[line.index(mark) :] for line in lines if mark in line})
    return record


def _end(group: int) -> None:
    """Ends what is left of a process group, and waits until it is gone."""
    for _ in range(100):
        try:
            os.killpg(group, signal.SIGKILL)
        except ProcessLookupError:
            return
        time.sleep(0.1)


def _show(record: Record) -> str:
    if "failed" in record:
        return f"FAILED ({record['failed']})"
    round_ = best_round(record)
    prompt = "" if round_["prompt_ms"] is None else f", prompt step {round_['prompt_ms']:.1f}"
    return (
        f"{round_['requests_per_s']:.1f} requests/s, decode step {round_['decode_ms']:.2f} ms{prompt}, "
        f"start {record['start_s']:.0f} s"
    )
