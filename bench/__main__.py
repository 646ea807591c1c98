"""``python -m bench``: measure, or make tables and a chart of what was measured."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from . import cases


def main() -> int:
    """Runs the command; the exit status is 1 when a result failed."""
    parser = argparse.ArgumentParser(
        prog="python -m bench",
        description="moe-lora beside vLLM's fused MoE-LoRA operators, in one process on one GPU.",
    )
    commands = parser.add_subparsers(dest="command", required=True)
    run = commands.add_parser("run", help="measure; needs a GPU, torch, triton and moe_lora")
    run.add_argument("--peers", type=Path, required=True, help="folder that python -m bench.fetch filled")
    run.add_argument("--out", type=Path, required=True, help="JSON lines to write")
    run.add_argument("--cases", type=Path, help="JSON file of cases to measure in place of the built-in ones")
    run.add_argument("--quick", action="store_true", help="few cases and a short replay")
    run.add_argument("--parts", default="all", help="first,cases,layers,routes,replay, or all")
    made = commands.add_parser("report", help="tables and a chart; needs matplotlib, no GPU")
    made.add_argument("results", type=Path, help="JSON lines that run wrote")
    made.add_argument("--out", type=Path, required=True, help="folder for the table and the chart")
    made.add_argument(
        "--into", type=Path, action="append", default=[], help="document whose marked sections are replaced"
    )
    args = parser.parse_args()
    if args.command == "report":
        from . import report

        report.write(args.results, args.out, args.into)
        return 0

    from .run import PARTS
    from .run import run as measure

    parts = PARTS if args.parts == "all" else args.parts.split(",")
    if unknown := set(parts) - set(PARTS):
        parser.error(f"no such part: {', '.join(sorted(unknown))}")
    chosen = None if args.cases is None else cases.read(args.cases)
    failures = measure(args.out, args.peers, chosen, args.quick, parts)
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
