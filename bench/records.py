"""The benchmark's results: a file of JSON lines, one record each, ``kind`` first."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

Record = dict[str, Any]

#: What readers know the implementations by.
NAMES = {
    "ours": "moe-lora",
    "standin": "in vLLM's place",
    "pr32770": "PR 32770",
    "vllm033": "vLLM 0.33.0",
    "tuned": "tuned",
}
#: This project's: as it is, and with the arguments and the routing arrays of vLLM's operators.
OURS = ("ours", "standin")


class Sink:
    """Where results go: the file, and a line each on the terminal."""

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self.file = path.open("w")
        self.begun = time.monotonic()
        #: Results that are missing because something failed.
        self.failures = 0

    def write(self, kind: str, line: str, **fields: Any) -> None:
        """One record, and what to show of it."""
        self.failures += sum("failed" in result for result in fields.get("results", {}).values())
        self.file.write(json.dumps({"kind": kind, **fields}) + "\n")
        self.file.flush()
        self.say(line)

    def say(self, line: str) -> None:
        """A line on the terminal alone."""
        print(f"{self.seconds:6.1f} s  {line}", flush=True)

    @property
    def seconds(self) -> float:
        """Since the beginning."""
        return time.monotonic() - self.begun


def read(path: Path) -> list[Record]:
    """The records of a file."""
    return [json.loads(line) for line in path.read_text().splitlines() if line.strip()]


class Results:
    """The records of one run, by kind."""

    def __init__(self, records: Sequence[Record]) -> None:
        self.records = records
        machines = self.of("machine")
        if not machines:
            raise ValueError("no record of the machine: these are not results of python -m bench run")
        self.machine = machines[0]

    def of(self, kind: str) -> list[Record]:
        """The records of a kind, in the order in which they were measured."""
        return [record for record in self.records if record["kind"] == kind]

    @property
    def slug(self) -> str:
        """The device's name as a file name: NVIDIA H100 80GB HBM3 is h100-80gb-hbm3.

        Results of a part of the benchmark have another, so that they replace nothing in the documents.
        """
        return f"{self.device}-partial" if self.machine.get("partial") else self.device

    @property
    def device(self) -> str:
        """The same of results of any part."""
        words = re.findall(r"[a-z0-9]+", self.machine["device"].lower())
        return "-".join(word for word in words if word != "nvidia")


def best_round(record: Record) -> Record:
    """Of a whole vLLM's rounds the one of the most requests a second."""
    rounds: list[Record] = record["rounds"]
    return max(rounds, key=lambda timed: float(timed["requests_per_s"]))


def show(result: Record) -> str:
    """One implementation's times, in microseconds: on a kept route, with routing, of the host."""
    if "failed" in result:
        return f"FAILED ({result['failed']})"
    return "/".join(f"{result[key]:.1f}" for key in ("us", "routed_us", "host_us") if key in result)
