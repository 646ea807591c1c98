"""Tables and the chart, from records by hand."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from bench import chart, report
from bench.cases import GPT_OSS, QWEN3, Case
from bench.records import Results

MACHINE = {
    "kind": "machine",
    "device": "NVIDIA H100 80GB HBM3",
    "driver": "580.1",
    "multiprocessors": 132,
    "l2_bytes": 50 << 20,
    "bandwidth": 2.9e12,
    "operations": 780e12,
    "versions": {"torch": "2.11.0"},
}


def _case(case: Case, floor: float, **results: dict[str, Any]) -> dict[str, Any]:
    return {
        "kind": "case",
        "case": case.to_json(),
        "bytes": 3_000_000,
        "floor_us": floor,
        "results": results,
    }


RECORDS = [
    MACHINE,
    _case(
        Case(QWEN3, "w13", 80, 64, 2),
        50.0,
        ours={"error": 1e-3, "us": 60.0, "routed_us": 64.0, "host_us": 9.0},
        standin={"error": 1e-3, "us": 66.0},
        pr32770={"error": 1e-3, "us": 120.0, "routed_us": 130.0, "host_us": 90.0},
        tuned={"of": "pr32770/16", "us": 90.0, "left_out": {"vllm033/128": "OutOfResources: shared memory"}},
        vllm033={"failed": "AssertionError: wrong result: error 1.0e+00"},
    ),
    _case(
        Case(GPT_OSS, "w2", 2048, 32, 4, dtype="f16", routing="zipf"),
        1000.0,
        ours={"us": 1250.0},
        pr32770={"us": 10000.0},
    ),
    {
        "kind": "replay",
        "results": {
            "ours": {
                "token_ms_mean": 5.0,
                "token_ms_p99": 6.0,
                "first_ms_mean": 7.0,
                "first_ms_p99": 8.0,
                "total_s": 9.0,
            }
        },
    },
]


@pytest.fixture
def results() -> Results:
    return Results(RECORDS)


def test_the_operator_table(results: Results) -> None:
    lines = report.operator(results).splitlines()
    assert lines[2] == (
        "| qwen3-30b-a3b | w13 | 80 | 64 | 2 | 50.0 | 60.0 | 83% | 50 "
        "| 66.0 (1.10×) | 120.0 (2.00×) | failed | 90.0 (1.50×) |"
    )
    assert lines[3] == (
        "| gpt-oss-20b | w2 | 2048 | 32, f16, zipf | 4 | 1,000 | 1,250 | 80% | 2 "
        "| – | 10,000 (8.00×) | – | – |"
    )


def test_the_selected_cases_have_fewer_columns() -> None:
    case = _case(Case(QWEN3, "w13", 80, 64, 2), 1000.0, ours={"us": 1250.0}, tuned={"us": 10000.0})
    lines = report.selected(Results([MACHINE, case])).splitlines()
    assert lines[0].count("|") == 12 and "GB/s" not in lines[0]
    assert lines[2] == "| qwen3-30b-a3b | w13 | 80 | 64 | 2 | 1,000 | 1,250 | 80% | – | – | 10,000 (8.00×) |"


def test_six_rows_are_those_that_were_measured(results: Results) -> None:
    lines = report.six_rows(results).splitlines()
    assert lines[2:] == ["| w13 | 80 | 50.0 | 60.0 | 83% | 120.0 (2.00×) | failed | 90.0 (1.50×) |"]


def test_the_machine_is_told_in_lines_of_a_document(results: Results) -> None:
    assert max(len(line) for line in report.machine(results).splitlines()) <= 110


def test_means_leave_out_what_is_missing(results: Results) -> None:
    lines = report.means(results).splitlines()
    assert (
        lines[2] == "| operator | 2 | 1.10 (1.10 to 1.10) | 4.00 (2.00 to 8.00) | – | 1.50 (1.50 to 1.50) |"
    )
    assert lines[3] == "| operator with routing | 1 | – | 2.03 (2.03 to 2.03) | – | – |"


def test_failures_are_listed(results: Results) -> None:
    text = report.failures(results)
    assert "vLLM 0.33.0: AssertionError: wrong result" in text
    assert "vllm033/128: OutOfResources" in text


def test_sections_without_records_are_left_out(results: Results) -> None:
    page = report.page(results, "chart.svg")
    assert "## Operator" in page and "## Serving" in page
    assert "## Layers" not in page


def test_splice_replaces_only_its_own_section() -> None:
    text = "a\n<!-- bench h100: means -->\nold\n<!-- end -->\nb\n<!-- bench h200: means -->\n<!-- end -->\n"
    spliced = report.splice(text, "h100: means", r"new \1")
    assert spliced == text.replace("old", r"new \1")
    assert report.splice(spliced, "h100: means", r"new \1") == spliced


def test_results_of_something_else_are_refused() -> None:
    with pytest.raises(ValueError, match="no record of the machine"):
        Results([{"kind": "case"}])


def test_files_are_named_for_the_device_and_come_out_the_same_twice(tmp_path: Path) -> None:
    source = tmp_path / "results.jsonl"
    source.write_text("\n".join(json.dumps(record) for record in RECORDS))
    document = tmp_path / "PERFORMANCE.md"
    document.write_text("<!-- bench h100-80gb-hbm3: serving -->\n<!-- end -->\n")
    readme = tmp_path / "README.md"
    readme.write_text("<!-- bench h100-80gb-hbm3: six rows -->\n<!-- end -->\n")
    first = report.write(source, tmp_path / "a", [document, readme])
    second = report.write(source, tmp_path / "b")
    names = [f"h100-80gb-hbm3{end}" for end in (".jsonl", ".md", ".svg", "-six-rows.svg")]
    assert [path.name for path in second] == names
    assert [path.read_bytes() for path in first[:4]] == [path.read_bytes() for path in second]
    assert "| moe-lora | 5.00 |" in document.read_text()
    assert "| w13 | 80 |" in readme.read_text()


def test_the_bars_say_how_many_times_longer(tmp_path: Path, results: Results) -> None:
    chart.draw_headline(results, tmp_path / "bars.svg")
    text = (tmp_path / "bars.svg").read_text()
    assert "w13, T = 80" in text and ">2.0<" in text and ">1.5<" in text
    # vLLM 0.33.0 failed: it has no bar.
    assert "vLLM 0.33.0" not in text
