"""The schedule of the serving run, and how its steps' times become latencies."""

from __future__ import annotations

from itertools import pairwise

import pytest

from bench import schedule
from bench.schedule import Chunk, Workload


@pytest.mark.parametrize(
    "load",
    [
        Workload(),
        Workload(requests=160),
        Workload(requests=7, prompt=5, output=3, concurrency=2, step_tokens=4),
        Workload(requests=3, prompt=9, output=1, concurrency=8, step_tokens=4),
    ],
)
def test_every_token_is_computed_once(load: Workload) -> None:
    steps = schedule.steps(load)
    computed, yielded = [0] * load.requests, [0] * load.requests
    for step in steps:
        assert 0 < schedule.tokens(step) <= load.step_tokens
        assert 0 < len(step) <= load.concurrency
        for chunk in step:
            computed[chunk.request] += chunk.tokens
            yielded[chunk.request] += chunk.yields
    # The last token of a request is never fed back.
    assert computed == [load.prompt + load.output - 1] * load.requests
    assert yielded == [load.output] * load.requests


def test_small_schedule_by_hand() -> None:
    steps = schedule.steps(Workload(requests=3, prompt=3, output=2, concurrency=2, step_tokens=4))
    assert steps == [
        [Chunk(0, 3, True), Chunk(1, 1, False)],
        [Chunk(0, 1, True), Chunk(1, 2, True)],
        [Chunk(1, 1, True), Chunk(2, 3, True)],
        [Chunk(2, 1, True)],
    ]


def test_the_serving_run_of_pull_request_32770() -> None:
    steps = schedule.steps(Workload())
    sizes = [schedule.tokens(step) for step in steps]
    assert sizes[:10] == [8192] * 10
    assert sum(sizes) == 800 * 1123
    assert sum(size == 80 for size in sizes) > 800


def test_requests_begin_in_order() -> None:
    begun = [chunk.request for step in schedule.steps(Workload()) for chunk in step]
    first_seen = list(dict.fromkeys(begun))
    assert all(earlier < later for earlier, later in pairwise(first_seen))


def test_latency_by_hand() -> None:
    load = Workload(requests=3, prompt=3, output=2, concurrency=2, step_tokens=4)
    waits = schedule.latency(schedule.steps(load), [10.0, 20.0, 40.0, 80.0], load)
    # Request 2 arrives when request 0 ends, after 30, and has its first token at 70.
    assert waits.first_token == [10.0, 30.0, 40.0]
    assert waits.later_tokens == [20.0, 40.0, 80.0]


def test_every_token_waits() -> None:
    load = Workload()
    steps = schedule.steps(load)
    waits = schedule.latency(steps, [1.0] * len(steps), load)
    assert len(waits.first_token) == 800
    assert len(waits.later_tokens) == 800 * 99


def test_summary_by_hand() -> None:
    load = Workload(requests=3, prompt=3, output=2, concurrency=2, step_tokens=4)
    assert schedule.summary(schedule.steps(load), [10.0, 20.0, 40.0, 80.0], load) == {
        "token_ms_mean": pytest.approx(140 / 3),
        "token_ms_p99": 80.0,
        "first_ms_mean": pytest.approx(80 / 3),
        "first_ms_p99": 40.0,
        "total_s": pytest.approx(0.15),
    }


def test_percentile() -> None:
    values = [float(value) for value in range(100, 0, -1)]
    assert schedule.percentile(values, 0.99) == 99.0
    assert schedule.percentile(values, 1.0) == 100.0
    assert schedule.percentile([3.0], 0.99) == 3.0


def test_workloads_without_size_are_refused() -> None:
    with pytest.raises(ValueError, match="must be positive"):
        schedule.steps(Workload(output=0))
