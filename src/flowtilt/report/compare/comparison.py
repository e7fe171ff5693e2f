"""Runs side by side: what each method reached, what that cost, and what to be careful about."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from flowtilt.errors import UserError
from flowtilt.estimate import NOTHING, Estimate
from flowtilt.io.run_folder import RunFolder
from flowtilt.report.axes import nice_step
from flowtilt.report.compare.costs import COSTS, Unit, unit_of
from flowtilt.report.compare.entries import Entry, odd_protocols
from flowtilt.report.compare.methods import Method, find_methods
from flowtilt.report.compare.notes import notes
from flowtilt.report.compare.spans import Ratio, crossing, ratio, span
from flowtilt.report.numbers import Array, number


@dataclass(frozen=True)
class Reach:
    """What a method's runs spent until their score first reached a target."""

    costs: Array  # [S], infinite where never
    spent: Array  # [S], by each run's last evaluation
    at_start: bool  # whether half the runs had the score at their first evaluation
    against: Ratio | None  # none of the baseline

    @property
    def runs(self) -> int:
        """Runs that got there."""
        return int(np.isfinite(self.costs).sum())

    @property
    def span(self) -> Estimate:
        return span(self.costs)


@dataclass(frozen=True)
class Comparison:
    """Methods, the first of them the baseline.

    Args:
        methods: one or more.
        axes: costs that all runs have logged, the chosen one first.
        targets: scores that have to be reached, rising.
        chosen: whether the targets were given; else they are a round score that all methods reached.
        odd: how protocols differ, a clause each; empty where they don't.
    """

    methods: list[Method]
    axes: list[str]
    targets: list[float]
    chosen: bool
    odd: list[str]

    @property
    def entries(self) -> list[Entry]:
        return [entry for method in self.methods for entry in method.entries]

    @cached_property
    def notes(self) -> list[str]:
        """What a reader has to know before believing the rest."""
        return notes(self.methods, self.odd)

    def unit(self, cost: str) -> Unit:
        return unit_of(cost, self.longest(cost))

    def longest(self, cost: str) -> float:
        return max(float(entry.costs[cost][-1]) for entry in self.entries)

    def shortest(self, cost: str) -> float:
        """What every run has spent at least."""
        return min(float(entry.costs[cost][-1]) for entry in self.entries)

    def final(self, method: Method) -> Estimate:
        return span([float(entry.scores[-1]) for entry in method.entries])

    def best(self, method: Method) -> Estimate:
        return span([float(entry.scores.max()) for entry in method.entries])

    def total(self, method: Method, cost: str) -> Estimate:
        """All that its runs spent on training, evaluated or not."""
        return span([max(_logged(entry, cost), float(entry.costs[cost][-1])) for entry in method.entries])

    def at_equal_cost(self, method: Method, cost: str) -> Estimate:
        """Score at the cost where the shortest of all runs ends."""
        return span([float(np.interp(self.shortest(cost), *entry.line(cost))) for entry in method.entries])

    def reach(self, method: Method, cost: str, target: float) -> Reach:
        """How a method fared with a target."""
        mine, spent = _costs(method, cost, target)
        had = [entry.scores[0] >= target for entry in method.entries]
        base = None if method is self.methods[0] else ratio(mine, spent, *_costs(self.methods[0], cost, target))
        return Reach(mine, spent, 2 * sum(had) >= len(had), base)


def compare(
    runs: Sequence[Path],
    *,
    labels: Mapping[str, Sequence[Path]] | None = None,
    axis: str = "evaluations",
    targets: Sequence[float] = (),
    mixed: bool = False,
) -> Comparison:
    """Reads runs, finished or not, and puts those that differ only in the seed together.

    Args:
        runs: folders of runs; the first one's method is the baseline.
        labels: name -> runs that are one method, whatever their recipes; they need not be among `runs`.
        axis: the leading cost: "evaluations", "seconds", "rollouts" or "optimizer-steps".
        targets: scores to reach; none takes a round one that the median of every method reached, if there is one.
        mixed: also compare runs that were not judged alike.

    Raises:
        UserError: a folder is no run or has no evaluation, runs are given twice or can't be told apart, their protocols
            differ, or a run has not logged its cost.
    """
    methods = find_methods(runs, labels or {})
    entries = [entry for method in methods for entry in method.entries]
    odd = odd_protocols(entries)
    if odd and not mixed:
        raise UserError(f"compare: scores can't be compared, as {'; '.join(odd)}; --mixed does so all the same, with a warning")
    for entry in entries:
        if axis not in entry.costs:
            lacks = f"{RunFolder.metrics} lacks {COSTS[axis].key} up to the last evaluation"
            raise UserError(f"run {entry.folder}: {lacks}; choose another --axis")
    axes = [axis, *(cost for cost in COSTS if cost != axis and all(cost in entry.costs for entry in entries))]
    return Comparison(methods, axes, sorted(set(targets)) or round_target(methods), bool(targets), odd)


def round_target(methods: Sequence[Method]) -> list[float]:
    """The highest round score that the median of every method reached and no run began with; [] where there is none."""
    base = max(float(entry.scores[0]) for method in methods for entry in method.entries)
    reached = min(span([float(entry.scores.max()) for entry in method.entries]).value for method in methods)
    if reached <= base:
        return []
    step = nice_step(reached - base, 10)
    # a step is at most a quarter of the way, so what is rounded down is still above the base
    return [round(step * math.floor(reached / step + 1e-9), 12)]


def _costs(method: Method, cost: str, target: float) -> tuple[Array, Array]:
    """What each run spent until a target, infinite where never, and in all its evaluations."""
    costs = [crossing(*entry.line(cost), target) for entry in method.entries]
    return np.array(costs), np.array([float(entry.costs[cost][-1]) for entry in method.entries])


def _logged(entry: Entry, cost: str) -> float:
    found = [number(record, COSTS[cost].key) for record in entry.run.metrics]
    return max((value for value in found if math.isfinite(value)), default=0.0)


def as_json(comparison: Comparison) -> dict[str, Any]:
    """All figures for programs; what was never reached or is not known is None."""
    return {
        "axes": {cost: COSTS[cost].key for cost in comparison.axes},
        "targets": comparison.targets,
        "baseline": comparison.methods[0].label,
        "notes": comparison.notes,
        "methods": [_method_json(comparison, method) for method in comparison.methods],
    }


def _method_json(comparison: Comparison, method: Method) -> dict[str, Any]:
    reaches = [(target, cost, comparison.reach(method, cost, target)) for target in comparison.targets for cost in comparison.axes]
    return {
        "label": method.label,
        "seeds": method.seeds,
        "settings": method.settings,
        "final": _known(comparison.final(method)),
        "best": _known(comparison.best(method)),
        "total": {cost: _known(comparison.total(method, cost)) for cost in comparison.axes},
        "at_equal_cost": {
            cost: {"cost": comparison.shortest(cost), "score": _known(comparison.at_equal_cost(method, cost))} for cost in comparison.axes
        },
        "reach": [
            {
                "target": target,
                "axis": cost,
                "runs": found.runs,
                "cost": _known(found.span),
                "against_baseline": _ratio_json(found.against) if found.against else None,
            }
            for target, cost, found in reaches
        ],
        "runs": [
            {
                "folder": str(entry.folder),
                "seed": entry.seed,
                "finished": entry.run.finished,
                "rollouts": entry.steps.astype(int).tolist(),
                "scores": entry.scores.tolist(),
                **{COSTS[cost].key: entry.costs[cost].tolist() for cost in comparison.axes},
                "guards": entry.run.guards,
            }
            for entry in method.entries
        ],
    }


def _known(found: Estimate) -> dict[str, float | None]:
    plain = {"median": found.value, "low": found.low, "high": found.high}
    return {key: value if math.isfinite(value) else None for key, value in plain.items()}


def _ratio_json(against: Ratio) -> dict[str, Any]:
    """Without numbers where nothing is known of the ratio."""
    known = against.bound in ("", "<", ">")
    return _known(against.of if known else NOTHING) | {"bound": against.bound if known else "unknown"}
