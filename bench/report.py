"""JSON lines to tables and charts. Needs no GPU and no torch; the charts need matplotlib."""

from __future__ import annotations

import re
import shutil
import textwrap
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from statistics import geometric_mean

from . import cases, chart
from .cases import QWEN3, Case, DenseCase
from .records import NAMES, Record, Results, best_round, read

#: What ours is compared with; the first is ours too.
PEERS = ("standin", "pr32770", "vllm033", "tuned")


def write(path: Path, folder: Path, documents: Sequence[Path] = ()) -> list[Path]:
    """Writes the results, their tables and charts to ``folder``, and tables into each of ``documents``.

    The files are named for the device. Returns what was written.
    """
    results = Results(read(path))
    folder.mkdir(parents=True, exist_ok=True)
    lines, table, picture = (folder / f"{results.slug}.{kind}" for kind in ("jsonl", "md", "svg"))
    bars = folder / f"{results.slug}-six-rows.svg"
    if path.resolve() != lines.resolve():
        shutil.copyfile(path, lines)
    table.write_text(page(results, picture.name))
    chart.draw(results, picture)
    chart.draw_headline(results, bars)
    written = [lines, table, picture, bars]
    for document in documents:
        text = document.read_text()
        for name, section in SECTIONS.items():
            # What is measured by a run of its own is not here.
            if made := section(results):
                text = splice(text, f"{results.slug}: {name}", made)
        document.write_text(text)
        written.append(document)
    return written


def write_section(path: Path, name: str, documents: Sequence[Path], folder: Path | None = None) -> None:
    """Replaces one section of documents alone. Results of a part of the benchmark will do.

    They are kept in ``folder``, where there is one, by the names of the device and the section.
    """
    results = Results(read(path))
    text = SECTIONS[name](results)
    if not text:
        raise ValueError(f"{path}: nothing was measured for {name!r}")
    for document in documents:
        before = document.read_text()
        after = splice(before, f"{results.device}: {name}", text)
        if begin_mark(f"{results.device}: {name}") not in before:
            raise ValueError(f"{document}: expected the mark {begin_mark(f'{results.device}: {name}')}")
        document.write_text(after)
    if folder is not None:
        kept = folder / f"{results.device}-{name.replace(' ', '-').lower()}.jsonl"
        if path.resolve() != kept.resolve():
            shutil.copyfile(path, kept)


def begin_mark(name: str) -> str:
    """What a section of a document begins with."""
    return f"<!-- bench {name} -->"


def splice(text: str, name: str, section: str) -> str:
    """Replaces what stands between ``<!-- bench NAME -->`` and ``<!-- end -->``, where that is found."""
    begin = re.escape(begin_mark(name))
    fill = f"{begin_mark(name)}\n{section.strip()}\n<!-- end -->"
    return re.sub(f"{begin}.*?<!-- end -->", lambda _: fill, text, flags=re.DOTALL)


def page(results: Results, picture: str) -> str:
    """All tables."""
    parts = [
        f"# {results.machine['device']}",
        machine(results),
        "Made by `cargo xtask bench`; [PERFORMANCE.md](../PERFORMANCE.md) says how it measures.",
        f"![time over tokens]({picture})",
    ]
    for name, section in SECTIONS.items():
        if section not in (machine, selected, six_rows) and (text := section(results)):
            # What is also measured alone can be replaced alone.
            marked = f"{begin_mark(f'{results.device}: {name}')}\n{text}\n<!-- end -->"
            parts += [f"## {name.capitalize()}", marked if section is dense_layers else text]
    return "\n\n".join(parts) + "\n"


def machine(results: Results) -> str:
    """The device and its ceilings, in a sentence."""
    m = results.machine
    versions = ", ".join(f"{name} {version}" for name, version in m["versions"].items())
    text = (
        f"{m['device']}, {m['multiprocessors']} multiprocessors, {m['l2_bytes'] / 2**20:.0f} MB of L2, "
        f"driver {m['driver']}; {versions}. In the same run a large copy reached "
        f"{m['bandwidth'] / 1e12:.2f} TB/s and a large bf16 matrix product {m['operations'] / 1e12:.0f} "
        "TFLOP/s: the floors are made of these."
    )
    return textwrap.fill(text, 110, break_long_words=False, break_on_hyphens=False)


def six_rows(results: Results) -> str:
    """Six calls on a kept route, in few columns."""
    rows = []
    for case in cases.headline():
        record = next((r for r in results.of("case") if Case.from_json(r["case"]) == case), None)
        if record is None:
            continue
        ours = record["results"].get("ours", {})
        share = f"{record['floor_us'] / ours['us']:.0%}" if "us" in ours else ""
        peers = [_against(record["results"].get(peer, {}), ours, "us") for peer in PEERS[1:]]
        rows.append([case.op, f"{case.tokens:,}", _us(record["floor_us"]), _time(ours, "us"), share, *peers])
    head = ["projection", "tokens", "floor", "moe-lora", "of the floor"]
    return _table([*head, *(NAMES[peer] for peer in PEERS[1:])], rows)


def operator(results: Results) -> str:
    """The operator on a kept route."""
    return _case_table(results, "us", floor=True)


def with_routing(results: Results) -> str:
    """The operator with each implementation's routing step."""
    return _case_table(results, "routed_us", floor=False)


def selected(results: Results) -> str:
    """The operator on a kept route, in the cases and columns that a document has room for."""
    return _case_table(results, "us", floor=True, only=cases.design(), peers=PEERS[1:], rate=False)


def _case_table(
    results: Results,
    key: str,
    floor: bool,
    only: Sequence[Case] | None = None,
    peers: Sequence[str] = PEERS,
    rate: bool = True,
) -> str:
    head = ["model", "op", "T", "R", "adapters"]
    head += ["floor", "moe-lora", "of the floor", *(["GB/s"] if rate else [])] if floor else ["moe-lora"]
    rows = []
    # Sorting is stable, so that variants follow the plain case that they vary.
    records = sorted(results.of("case"), key=lambda record: _order(Case.from_json(record["case"])))
    for record in records:
        case = Case.from_json(record["case"])
        if only is not None and case not in only:
            continue
        ours = record["results"].get("ours", {})
        row = [case.model.name, case.op, str(case.tokens), _rank(case), str(case.adapters)]
        if floor:
            row.append(_us(record["floor_us"]))
        row.append(_time(ours, key))
        if floor:
            row.append(f"{record['floor_us'] / ours[key]:.0%}" if key in ours else "")
        if floor and rate:
            row.append(f"{record['bytes'] / ours[key] / 1e3:,.0f}" if key in ours else "")
        row += [_against(record["results"].get(peer, {}), ours, key) for peer in peers]
        rows.append(row)
    return _table([*head, *(NAMES[peer] for peer in peers)], rows)


def _order(case: Case) -> tuple[object, ...]:
    variant = (case.rank, case.dtype != "bf16", case.routing != "uniform", case.own_rank is not None)
    plain = variant == (64, False, False, False)
    return (case.model.name != QWEN3.name, case.model.name, not plain, case.op != "w13", variant, case.tokens)


def _rank(case: Case) -> str:
    rank = str(case.rank) if case.own_rank is None else f"{case.own_rank} in {case.rank}"
    extra = [part for part in (case.dtype, case.routing) if part not in ("bf16", "uniform")]
    return ", ".join([rank, *extra])


def means(results: Results) -> str:
    """How many times longer the peers take, over all cases."""
    rows = []
    for label, kind, key in (
        ("operator", "case", "us"),
        ("operator with routing", "case", "routed_us"),
        ("layer", "layer", "us"),
    ):
        cells, counted = [], 0
        for peer in PEERS:
            ratios = [
                record["results"][peer][key] / record["results"]["ours"][key]
                for record in results.of(kind)
                if key in record["results"].get(peer, {}) and key in record["results"].get("ours", {})
            ]
            counted = max(counted, len(ratios))
            spread = (
                f"{geometric_mean(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})" if ratios else "–"
            )
            cells.append(spread)
        if counted:
            rows.append([label, str(counted), *cells])
    return _table(["", "cases", *(NAMES[peer] for peer in PEERS)], rows)


def layers(results: Results) -> str:
    """Whole layers."""
    rows = []
    for record in results.of("layer"):
        ours = record["results"].get("ours", {})
        row = [str(record["cases"][0]["tokens"]), _us(record["floor_us"]), _time(ours, "us")]
        rows.append(row + [_against(record["results"].get(peer, {}), ours, "us") for peer in PEERS])
    return _table(["T", "floor", "moe-lora", *(NAMES[peer] for peer in PEERS)], rows)


def dense_layers(results: Results) -> str:
    """Dense layers on a route that was made before."""
    rows = []
    for record in results.of("dense"):
        case, by = DenseCase.from_json(record["case"]), record["results"]
        ours = by.get("ours", {})
        widths = " + ".join(f"{width:,}" for width in case.out_dims)
        rows.append(
            [
                case.op,
                f"{case.in_dim:,} → {widths}",
                f"{case.tokens:,}",
                _us(record["floor_us"]),
                _time(ours, "us"),
                f"{record['floor_us'] / ours['us']:.0%}" if "us" in ours else "",
                *(_against(by.get(label, {}), ours, "us") for label in ("table", "vllm033")),
            ]
        )
    head = ["layer", "widths", "tokens", "floor", "moe-lora", "of the floor", "on a table"]
    return _table([*head, f"{NAMES['vllm033']}, shrink + expand"], rows)


def pairs(results: Results) -> str:
    """How many times longer calls take on a table than on stacked weights."""
    rows = []
    for record in results.of("pair"):
        ratios = [record["ratios"].get(key) for key in ("us", "routed_us")]
        cells = [f"{ratio:.3f}" if ratio is not None else "failed" for ratio in ratios]
        rows.append([Case.from_json(record["case"]).describe(), *cells])
    for record in results.of("pairs"):
        means = [record["means"].get(key) for key in ("us", "routed_us")]
        rows.append(["geometric mean", *(f"{mean:.3f}" if mean is not None else "–" for mean in means)])
    return _table(["table over stacked", "on a kept route", "with routing"], rows)


def routing(results: Results) -> str:
    """The routing step alone."""
    rows = []
    for record in results.of("route"):
        case, ours = Case.from_json(record["case"]), record["results"].get("ours", {})
        vllm = _against(record["results"].get("vllm033", {}), ours, "us")
        rows.append([f"{case.pairs:,}", _time(ours, "us"), vllm])
    return _table(["pairs", "moe-lora", NAMES["vllm033"]], rows)


def host(results: Results) -> str:
    """Host time a call."""
    names = ("ours", "standin", "pr32770", "vllm033")
    rows = []
    for record in results.of("case"):
        if any("host_us" in result for result in record["results"].values()):
            cells = [_time(record["results"].get(name, {}), "host_us") for name in names]
            rows.append([Case.from_json(record["case"]).describe(), *cells])
    return _table(["", *(NAMES[name] for name in names)], rows)


def first_result(results: Results) -> str:
    """From import to the first result of a fresh process."""
    rows = []
    for record in results.of("first"):
        for name, result in record["results"].items():
            cells = [result.get("failed", "")] * 2
            if "failed" not in result:
                cells = [_parts(result[caches]) for caches in ("empty_ms", "filled_ms")]
            rows.append([NAMES[name], *cells])
    return _table(["", "empty caches, ms", "filled caches, ms"], rows)


def _parts(milliseconds: dict[str, float]) -> str:
    parts = ", ".join(f"{name} {time:.0f}" for name, time in milliseconds.items())
    return f"{sum(milliseconds.values()):.0f} ({parts})"


def serving(results: Results) -> str:
    """The replay of a serving run."""
    rows = []
    columns = {
        "token_ms_mean": "a token: mean, ms",
        "token_ms_p99": "p99, ms",
        "first_ms_mean": "first token: mean, ms",
        "first_ms_p99": "p99, ms",
        "total_s": "in all, s",
    }
    for record in results.of("replay"):
        for name, result in record["results"].items():
            if "failed" in result:
                rows.append([NAMES.get(name, name), *["failed"] * len(columns)])
            else:
                rows.append([NAMES[name], *(f"{result[key]:.2f}" for key in columns)])
    return _table(["", *columns.values()], rows)


def in_vllm(results: Results) -> str:
    """A whole vLLM with adapters, and how much of its rate without any is left: the best round of each."""
    records = {record["variant"]: record["results"][record["variant"]] for record in results.of("vllm")}
    rounds = {variant: best_round(record) for variant, record in records.items() if "rounds" in record}
    base = rounds.get("base")
    rows = []
    for variant, timed in rounds.items():
        share = f"{timed['requests_per_s'] / base['requests_per_s']:.0%}" if base else "–"
        prompt = timed["prompt_ms"]
        rows.append(
            [
                VARIANTS[variant],
                f"{timed['requests_per_s']:.1f}",
                share,
                f"{timed['decode_ms']:.2f}",
                f"{prompt:.0f}" if prompt is not None else "–",
                f"{timed['first_token_ms']:,.0f}",
            ]
        )
    head = ["LoRA", "requests/s", "of base", "decode step, ms", "prompt step, ms", "first token, ms"]
    return _table(head, rows)


#: What the variants of a whole vLLM are called.
VARIANTS = {
    "base": "none",
    "off-x": "on experts, vLLM's own",
    "on-x": "on experts, moe-lora",
    "off": "on experts and attention, vLLM's own",
    "on": "on experts and attention, moe-lora",
}


def accuracy(results: Results) -> str:
    """The largest error of each implementation over all cases, by type."""
    worst: dict[str, dict[str, float]] = {}
    for record in results.of("case"):
        for name, result in record["results"].items():
            if "error" in result:
                errors = worst.setdefault(record["case"]["dtype"], {})
                errors[name] = max(errors.get(name, 0.0), result["error"])
    names = ("ours", *PEERS)
    rows = [
        [dtype, *(f"{errors[name]:.1e}" if name in errors else "–" for name in names)]
        for dtype, errors in worst.items()
    ]
    return _table(["", *(NAMES[name] for name in names)], rows)


def failures(results: Results) -> str:
    """Every result that is missing, and why."""
    lines = []
    for record in results.records:
        for name, result in record.get("results", {}).items():
            what = record.get("what", record["kind"])
            if "case" in record:
                kind = DenseCase if record["kind"] == "dense" else Case
                case = kind.from_json(record["case"]).describe()
                what = case if record["kind"] == "case" else f"{what}, {case}"
            for label, why in [(name, result.get("failed")), *result.get("left_out", {}).items()]:
                if why:
                    lines.append(f"- {what}, {NAMES.get(label, label)}: {why.splitlines()[-1]}")
    return "\n".join(lines)


#: What a document may have between marks, by name.
SECTIONS: dict[str, Callable[[Results], str]] = {
    "machine": machine,
    "six rows": six_rows,
    "means": means,
    "selected cases": selected,
    "operator": operator,
    "operator with routing": with_routing,
    "layers": layers,
    "dense layers": dense_layers,
    "stacked weights and tables": pairs,
    "routing": routing,
    "host time": host,
    "first result": first_result,
    "serving": serving,
    "in vLLM": in_vllm,
    "largest errors": accuracy,
    "failures": failures,
}


def _us(value: float) -> str:
    return f"{value:.1f}" if value < 1000 else f"{value:,.0f}"


def _time(result: Record, key: str) -> str:
    return "failed" if "failed" in result else _us(result[key]) if key in result else "–"


def _against(peer: Record, ours: Record, key: str) -> str:
    """A peer's time, and how many times ours it is."""
    if key in peer and key in ours:
        return f"{_us(peer[key])} ({peer[key] / ours[key]:.2f}×)"
    return _time(peer, key)


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [list(head), ["---"] * len(head), *(list(row) for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) if len(lines) > 2 else ""
