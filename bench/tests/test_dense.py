"""Cases, floors and tables of dense layers, and the comparison of stacked weights with tables."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from bench import cases, fetch, report
from bench.__main__ import main
from bench.cases import QWEN3, Case, DenseCase
from bench.floors import dense_floor
from bench.records import Results
from bench.tests.test_report import MACHINE

QKV = DenseCase(QWEN3.name, "qkv", 2048, (4096, 512, 512), tokens=80, rank=64, adapters=2)


def dense(case: DenseCase, floor: float, **results: dict[str, Any]) -> dict[str, Any]:
    return {"kind": "dense", "case": case.to_json(), "floor_us": floor, "results": results}


RECORDS = [
    {**MACHINE, "partial": True},
    dense(
        QKV,
        4.0,
        ours={"error": 1e-3, "us": 5.0},
        table={"error": 1e-3, "us": 5.5},
        vllm033={"error": 2e-3, "us": 12.5},
    ),
    dense(
        DenseCase(QWEN3.name, "o", 4096, (2048,), tokens=8192, rank=64, adapters=2),
        50.0,
        ours={"us": 62.5},
        vllm033={"failed": "AssertionError: wrong result: error 1.0e+00"},
    ),
    {
        "kind": "pair",
        "case": Case(QWEN3, "w13", 80, 64, 2).to_json(),
        "ratios": {"us": 1.01},
        "results": {"ours": {"us": 50.0}, "table": {"us": 50.5}},
    },
    {"kind": "pairs", "means": {"us": 1.01, "routed_us": 1.0}, "cases": 1},
]


def test_every_case_is_there_once_and_survives_json() -> None:
    listed = cases.dense(quick_run=False)
    assert len(set(listed)) == 10 and set(cases.dense(quick_run=True)) < set(listed)
    assert {case.tokens for case in listed} == {1, 16, 80, 1024, 8192} and QKV in listed
    for case in listed:
        assert DenseCase.from_json(json.loads(json.dumps(case.to_json()))) == case


def test_floor_by_hand() -> None:
    least = dense_floor(QKV, adapters=2)
    matrices = 64 * (3 * 2048 + 5120)
    assert least.bytes == 2 * (2 * matrices + 80 * (2048 + 2 * 5120))
    assert least.operations == 2 * 80 * matrices


def test_the_dense_table() -> None:
    lines = report.dense_layers(Results(RECORDS)).splitlines()
    assert lines[2] == (
        "| qkv | 2,048 → 4,096 + 512 + 512 | 80 | 4.0 | 5.0 | 80% | 5.5 (1.10×) | 12.5 (2.50×) |"
    )
    assert lines[3] == "| o | 4,096 → 2,048 | 8,192 | 50.0 | 62.5 | 80% | – | failed |"


def test_failures_name_dense_cases() -> None:
    text = report.failures(Results(RECORDS))
    assert text == (
        "- dense, qwen3-30b-a3b o T=8192 R=64 2 adapters, vLLM 0.33.0: "
        "AssertionError: wrong result: error 1.0e+00"
    )


def test_the_table_of_pairs() -> None:
    lines = report.pairs(Results(RECORDS)).splitlines()
    assert lines[2:] == [
        "| qwen3-30b-a3b w13 T=80 R=64 2 adapters | 1.010 | failed |",
        "| geometric mean | 1.010 | 1.000 |",
    ]


def test_a_part_replaces_its_own_section_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    results, document = tmp_path / "results.jsonl", tmp_path / "h100.md"
    results.write_text("\n".join(json.dumps(record) for record in RECORDS))
    mark = "<!-- bench h100-80gb-hbm3: dense layers -->"
    document.write_text(f"before\n{mark}\n<!-- end -->\nafter\n")
    command = ["bench", "report", str(results), "--only", "dense layers", "--into", str(document)]
    monkeypatch.setattr("sys.argv", command)
    assert main() == 0
    text = document.read_text()
    assert text.startswith(f"before\n{mark}\n| layer |") and text.endswith("|\n<!-- end -->\nafter\n")
    assert list(tmp_path.iterdir()) in ([results, document], [document, results])
    # The page of a whole run has the same marks.
    assert mark in report.page(Results([{**RECORDS[0], "partial": False}, *RECORDS[1:]]), "chart.svg")
    document.write_text("no mark\n")
    with pytest.raises(ValueError, match="expected the mark"):
        main()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["run", "--out", "x"], "--peers: expected a folder"),
        (["run", "--out", "x", "--peers", "y", "--parts", "densest"], "no such part: densest"),
        (["report", "x"], "--out: expected a folder"),
        (["report", "x", "--only", "dense layers"], "--only: expected one of"),
        (["report", "x", "--only", "dance", "--into", "y"], "--only: expected one of"),
    ],
)
def test_arguments_that_make_no_sense(
    arguments: list[str],
    message: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    if arguments[0] == "run":
        pytest.importorskip("torch", reason="PyTorch is not installed")
    monkeypatch.setattr("sys.argv", ["bench", *arguments])
    with pytest.raises(SystemExit):
        main()
    assert message in capsys.readouterr().err


def test_files_of_the_dense_pair_have_names_of_their_own() -> None:
    _, files = fetch.RELEASES["0.33.0"]
    names = list(files.values())
    assert len(set(names)) == len(names) and fetch.dense_file("utils") in names
