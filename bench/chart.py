"""The charts, as vector pictures: time over tokens, and six calls beside vLLM's operators."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from .cases import QWEN3, Case, headline
from .records import NAMES, Record, Results

#: Okabe and Ito's colours, which those who confuse red and green tell apart.
COLOURS = {"ours": "#0072B2", "pr32770": "#D55E00", "vllm033": "#009E73", "tuned": "#CC79A7"}

#: The same results make the same file.
STYLE: dict[str, Any] = {
    "svg.hashsalt": "moe-lora",
    "svg.fonttype": "none",
    "font.size": 9,
    "axes.grid": True,
    "grid.color": "#dddddd",
    "axes.spines.top": False,
    "axes.spines.right": False,
}

#: Tokens that are written at the axis.
TICKS = [1, 4, 16, 64, 256, 1024, 4096, 16384]


def draw(results: Results, path: Path) -> None:
    """Time over tokens of the plain Qwen3 cases: on a kept route above, with routing below."""
    plt = _pyplot()
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(2, 2, figsize=(9.6, 7.2), sharex=True, sharey=True, layout="constrained")
        for row, (key, what) in zip(
            axes, (("us", "shrink and expand"), ("routed_us", "with routing")), strict=True
        ):
            for axis, op in zip(row, ("w13", "w2"), strict=True):
                _lines(axis, results, op, key)
                axis.set_title(f"{op}, {what}", loc="left")
        for axis in axes[1]:
            axis.set_xlabel("tokens")
        for axis in axes[:, 0]:
            axis.set_ylabel("µs a call")
        axes[0, 0].legend(frameon=False)
        figure.suptitle(f"Qwen3-30B-A3B, rank 64, two adapters, bf16, {results.machine['device']}")
        figure.savefig(path, metadata={"Date": None})
        plt.close(figure)


def draw_headline(results: Results, path: Path) -> None:
    """How many times longer vLLM's operators take than moe-lora: a group of bars for each of six calls."""
    plt = _pyplot()
    names = [name for name in COLOURS if name != "ours"]
    with plt.rc_context(STYLE):
        figure, axis = plt.subplots(figsize=(7.2, 3.6), layout="constrained")
        calls = [(case, record) for case in headline() if (record := _plain(results, case)) is not None]
        for place, name in enumerate(names):
            bars = [
                (row + (place - 1) * 0.26, record["results"][name]["us"] / record["results"]["ours"]["us"])
                for row, (_, record) in enumerate(calls)
                if "us" in record["results"].get(name, {}) and "us" in record["results"].get("ours", {})
            ]
            if bars:
                at, ratios = zip(*bars, strict=True)
                axis.barh(at, ratios, height=0.24, color=COLOURS[name], label=NAMES[name], zorder=2)
                for y, ratio in bars:
                    style: dict[str, Any] = {"textcoords": "offset points", "va": "center", "fontsize": 7}
                    axis.annotate(f"{ratio:.1f}", (ratio, y), (2, 0), **style)
        labels = [f"{case.op}, T = {case.tokens:,}" for case, _ in calls]
        axis.set_yticks(range(len(labels)), labels=labels)
        axis.invert_yaxis()
        axis.grid(visible=False, axis="y")
        axis.axvline(1, color=COLOURS["ours"], linewidth=2.2, zorder=3, label=NAMES["ours"])
        axis.set_xlabel("times as long as moe-lora")
        axis.legend(frameon=False, loc="lower right")
        axis.set_title(f"Qwen3-30B-A3B, rank 64, two adapters, {results.machine['device']}", loc="left")
        figure.savefig(path, metadata={"Date": None})
        plt.close(figure)


def _pyplot() -> Any:
    """Imported when something is drawn: tables need no matplotlib."""
    import matplotlib

    matplotlib.use("svg")
    import matplotlib.pyplot as plt

    return plt


def _plain(results: Results, case: Case) -> Record | None:
    """The record of a case."""
    return next((r for r in results.of("case") if Case.from_json(r["case"]) == case), None)


def _lines(axis: Any, results: Results, op: str, key: str) -> None:
    """One panel."""
    points: dict[int, Record] = {}
    for record in results.of("case"):
        case = Case.from_json(record["case"])
        if case == Case(QWEN3, op, case.tokens, rank=64, adapters=2):
            points[case.tokens] = record
    tokens = sorted(points)
    axis.set_xscale("log", base=2)
    axis.set_xticks(TICKS, labels=[str(tick) for tick in TICKS])
    axis.set_yscale("log")
    axis.yaxis.set_major_formatter("{x:g}")
    floors = [points[t]["floor_us"] for t in tokens]
    axis.plot(tokens, floors, color="#666666", linestyle="--", linewidth=1, label="floor")
    for name, colour in COLOURS.items():
        timed = [(t, points[t]["results"].get(name, {}).get(key)) for t in tokens]
        timed = [(t, time) for t, time in timed if time is not None]
        if timed:
            width, order = (2.2, 3) if name == "ours" else (1.2, 2)
            style = {"color": colour, "linewidth": width, "zorder": order, "marker": "o", "markersize": 2.5}
            axis.plot(*zip(*timed, strict=True), label=NAMES[name], **style)
