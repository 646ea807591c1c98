"""Cases: their shapes, their JSON, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from bench import cases
from bench.cases import DEEPSEEK, QWEN3, Case
from bench.floors import Ceilings, floor


def test_shapes_of_both_projections() -> None:
    w13, w2 = (Case(QWEN3, op, tokens=10, rank=64, adapters=2) for op in ("w13", "w2"))
    assert (w13.k, w13.n, w13.slices, w13.x_rows, w13.pairs) == (2048, 768, 2, 10, 80)
    assert (w2.k, w2.n, w2.slices, w2.x_rows, w2.pairs) == (768, 2048, 1, 80, 80)


def test_every_built_in_case_is_there_once_and_survives_json() -> None:
    listed = cases.everything()
    assert len(listed) == len(set(listed))
    assert {*cases.design(), *cases.chart(), *cases.variety(), *cases.quick()} == set(listed)
    for case in listed:
        assert Case.from_json(json.loads(json.dumps(case.to_json()))) == case


def test_a_file_of_cases(tmp_path: Path) -> None:
    sizes = {"name": "mine", "hidden": 512, "intermediate": 96, "experts": 4, "top_k": 2}
    fields = {"op": "w2", "tokens": 3, "rank": 8, "adapters": 1}
    path = tmp_path / "cases.json"
    path.write_text(json.dumps([{"model": "deepseek-v3-tp8", **fields}, {"model": sizes, **fields}]))
    first, second = cases.read(path)
    assert first == Case(DEEPSEEK, "w2", 3, 8, 1)
    assert (second.model.name, second.k, second.n) == ("mine", 96, 512)


GOOD = {"model": "olmoe-1b-7b", "op": "w13", "tokens": 1, "rank": 8, "adapters": 1}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"op": "w1"}, "op: 'w1' is none of w13, w2"),
        ({"dtype": "f32"}, "dtype: 'f32' is none of bf16, f16"),
        ({"routing": "round-robin"}, "routing: "),
        ({"tokens": 0}, "tokens: expected a positive integer, got 0"),
        ({"rank": 1.5}, "rank: expected a positive integer, got 1.5"),
        ({"own_rank": 9}, "own_rank: expected 1 to 8, got 9"),
        ({"model": "gpt-2"}, "model: expected one of "),
        ({"model": None}, "model: expected one of "),
        ({"token": 4}, "unexpected keyword argument 'token'"),
    ],
)
def test_what_is_no_case_is_refused(change: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Case.from_json({**GOOD, **change})


def test_floor_by_hand() -> None:
    # One token, eight experts: 8·64·(2048+768)·2 weights, 2048 of x, 8·1536 of out read and written.
    least = floor(Case(QWEN3, "w13", 1, rank=64, adapters=2), segments=8)
    assert least.bytes == 2 * (8 * 64 * 2816 * 2 + 2048 + 2 * 8 * 1536)
    assert least.operations == 2 * 8 * 64 * 2816 * 2
    assert least.microseconds(Ceilings(3.0e12, 790e12)) == pytest.approx(1.94, abs=0.01)
    # Bound by operations where each is dear.
    assert least.microseconds(Ceilings(3.0e12, 1e6)) == pytest.approx(least.operations)


def test_floor_counts_the_rank_in_use() -> None:
    own = Case(QWEN3, "w13", 80, rank=128, adapters=2, own_rank=8)
    assert floor(own, 200) == floor(Case(QWEN3, "w13", 80, rank=8, adapters=2), 200)
