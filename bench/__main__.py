"""``python -m bench``: measure, or make tables and a chart of what was measured."""

from __future__ import annotations

import argparse
import json
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
    run.add_argument("--peers", type=Path, help="folder that python -m bench.fetch filled")
    run.add_argument("--out", type=Path, required=True, help="JSON lines to write")
    run.add_argument("--cases", type=Path, help="JSON file of cases to measure in place of the built-in ones")
    run.add_argument("--quick", action="store_true", help="few cases and a short replay")
    run.add_argument("--parts", default="all", help="first,cases,layers,routes,dense,replay, or all")
    run.add_argument(
        "--table", action="store_true", help="only: stacked weights against a table of them; needs no peers"
    )
    whole = commands.add_parser("vllm", help="measure a whole vLLM with adapters and without; needs a GPU")
    whole.add_argument("--kit", type=Path, help="folder whose site/ has a vLLM; without: the installed one")
    whole.add_argument("--out", type=Path, required=True, help="JSON lines to write; logs go beside it")
    whole.add_argument("--variants", default="base,off-x,on-x,off,on", help="which, in this order")
    whole.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="NAME=JSON",
        help="another value of bench/in_vllm/settings.py, as layers=4 or engine={\"quantization\": \"fp8\"}",
    )
    made = commands.add_parser("report", help="tables and a chart; needs matplotlib, no GPU")
    made.add_argument("results", type=Path, help="JSON lines that run wrote")
    made.add_argument("--out", type=Path, help="folder for the table and the chart")
    made.add_argument(
        "--into", type=Path, action="append", default=[], help="document whose marked sections are replaced"
    )
    made.add_argument("--only", help="the section of --into that is replaced, from results of any part")
    args = parser.parse_args()
    if args.command == "report":
        from . import report

        if args.only is not None:
            if args.only not in report.SECTIONS or not args.into:
                parser.error(f"--only: expected one of {', '.join(report.SECTIONS)}, with --into")
            report.write_section(args.results, args.only, args.into, args.out)
        elif args.out is None:
            parser.error("--out: expected a folder")
        else:
            report.write(args.results, args.out, args.into)
        return 0

    if args.command == "vllm":
        return _vllm(args, parser)

    from .run import PAIRING, PARTS
    from .run import run as measure

    parts = PARTS if args.parts == "all" else tuple(args.parts.split(","))
    if args.table:
        parts = (PAIRING,)
    if unknown := set(parts) - {*PARTS, PAIRING}:
        parser.error(f"no such part: {', '.join(sorted(unknown))}")
    if args.peers is None and parts != (PAIRING,):
        parser.error("--peers: expected a folder")
    chosen = None if args.cases is None else cases.read(args.cases)
    failures = measure(args.out, args.peers, chosen, args.quick, parts)
    return 1 if failures else 0


def _vllm(args: argparse.Namespace, parser: argparse.ArgumentParser) -> int:
    from .in_vllm import run as in_vllm
    from .in_vllm.settings import VARIANTS, Settings

    variants = args.variants.split(",")
    if unknown := set(variants) - set(VARIANTS):
        parser.error(f"no such variant: {', '.join(sorted(unknown))}; there are {', '.join(VARIANTS)}")
    settings = Settings()
    for setting in args.set:
        name, _, value = setting.partition("=")
        if not hasattr(settings, name):
            parser.error(f"--set {name}: expected one of {', '.join(vars(settings))}")
        try:
            setattr(settings, name, json.loads(value))
        except json.JSONDecodeError as error:
            parser.error(f"--set {name}: {error}")
    return 1 if in_vllm.run(args.out, args.kit, variants, settings) else 0


if __name__ == "__main__":
    sys.exit(main())
