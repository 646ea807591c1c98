"""Stacked weights against a table that names the same memory: this project with itself, replayed in turns."""

from __future__ import annotations

from functools import partial
from statistics import geometric_mean

from . import measure
from .cases import Case
from .data import Projection, Routing, sets_needed
from .floors import Ceilings, floor
from .operator_runs import KEYS, Make, Shelf, make_checked, time_both
from .ours import OnTables, Ours
from .records import Sink


class Pairing:
    """The comparison, case by case, and its means."""

    def __init__(self, sink: Sink, ceilings: Ceilings) -> None:
        self.sink, self.ceilings = sink, ceilings
        self.shelf = Shelf()
        #: How many times longer the table takes, for each case.
        self.ratios: dict[str, list[float]] = {key: [] for key in KEYS}

    def run_case(self, case: Case) -> None:
        """Both, checked and timed."""
        routing = Routing(case)
        routing.draw(seed=case.tokens)
        segments = routing.segments()
        sets = sets_needed(case, segments)
        projection = Projection(case, routing, self.shelf.take(case, sets))
        makers: dict[str, Make] = {
            "ours": partial(Ours, routing, case.rank),
            "table": partial(OnTables, routing, case.rank, projection),
        }
        routing.draw(seed=case.tokens + 1, bare_tokens=True)
        ready, results = make_checked(makers, projection)

        routing.draw(seed=case.tokens)
        projection.out.zero_()
        for implementation in ready.values():
            implementation.routed(projection, 0)
        floor_us = floor(case, segments).microseconds(self.ceilings)
        time_both(results, ready, projection, sets, measure.calls_of(floor_us))
        ratios = {
            key: results["table"][key] / results["ours"][key]
            for key in KEYS
            if all(key in results[label] for label in ("ours", "table"))
        }
        for key, ratio in ratios.items():
            self.ratios[key].append(ratio)
        said = ", ".join(
            f"{key} {results['ours'][key]:.1f} → {results['table'][key]:.1f} ({ratio:.3f}×)"
            for key, ratio in ratios.items()
        )
        failed = ", ".join(f"{label}: {why['failed']}" for label, why in results.items() if "failed" in why)
        self.sink.write(
            "pair",
            f"{case.describe()}: stacked → table {said or failed}",
            case=case.to_json(),
            segments=segments,
            sets=sets,
            floor_us=floor_us,
            ratios=ratios,
            results=results,
        )

    def finish(self) -> None:
        """The geometric means."""
        means = {key: geometric_mean(ratios) for key, ratios in self.ratios.items() if ratios}
        said = ", ".join(
            f"{key} {mean:.3f}× ({min(self.ratios[key]):.3f} to {max(self.ratios[key]):.3f})"
            for key, mean in means.items()
        )
        cases = max(map(len, self.ratios.values()))
        self.sink.write("pairs", f"table over stacked, {cases} cases: {said}", means=means, cases=cases)
        self.shelf.clear()
