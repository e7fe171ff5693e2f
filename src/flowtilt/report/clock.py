"""What the curves of a run stand on: rollouts, and by choice training time or network evaluations."""

import math
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from flowtilt.report.axes import Axis, nice_step, round_ticks
from flowtilt.report.loading import Run
from flowtilt.report.numbers import Array, number, short

KNOTS = 200
"""Points by which the page's script turns rollouts into time; between them both pass evenly."""
TICKS, FEW = 6, 3
"""Ticks of a wide and of a small chart."""


@dataclass(frozen=True)
class Spent:
    """One other axis: what was spent by each of the clock's steps, [N], never falling, in a unit that reads well."""

    name: str
    unit: str
    values: Array

    def axis(self, count: int) -> Axis:
        high = float(self.values[-1])
        return Axis(0.0, high, round_ticks(0.0, high, nice_step(high, count)))


@dataclass(frozen=True)
class Clock:
    """The common x axis of a run's curves, and the others that a reader can choose."""

    steps: Array  # [N], rising from 0
    others: tuple[Spent, ...]

    @cached_property
    def last(self) -> float:
        return float(self.steps[-1]) or 1.0

    def axis(self, count: int = TICKS) -> Axis:
        return Axis(0.0, self.last, round_ticks(0.0, self.last, max(1.0, nice_step(self.last, count))))

    def read(self, step: float) -> str:
        """rollout 12 · 3.4 min."""
        return " · ".join([f"rollout {step:,.0f}", *(f"{short(self._at(other, step))} {other.unit}" for other in self.others[:1])])

    def choices(self) -> list[dict[str, Any]]:
        """The axes for the page's script, rollouts first: {"name", "unit", "ticks", "few", "knots"}, places in percent."""
        found = [self._choice("rollouts", "rollout", self.axis(TICKS), self.axis(FEW), self.steps)]
        return found + [self._choice(o.name, o.unit, o.axis(TICKS), o.axis(FEW), o.values) for o in self.others]

    def _choice(self, name: str, unit: str, axis: Axis, few: Axis, values: Array) -> dict[str, Any]:
        kept = np.unique(np.linspace(0, len(values) - 1, KNOTS).round().astype(int)) if len(values) > KNOTS else np.arange(len(values))
        places = [[round(100 * float(self.steps[k]) / self.last, 3), round(axis.percent(float(values[k])), 3)] for k in kept]
        ticks = {key: [[round(a.percent(value), 2), label] for value, label in a.ticks] for key, a in (("ticks", axis), ("few", few))}
        return {"name": name, "unit": unit, **ticks, "knots": places}

    def _at(self, other: Spent, step: float) -> float:
        return float(np.interp(step, self.steps, other.values))


def time_unit(longest: float) -> tuple[str, float]:
    """The unit in which so many seconds read well, and its seconds."""
    return ("s", 1.0) if longest < 300 else ("min", 60.0) if longest < 3 * 3600 else ("h", 3600.0)


def count_unit(highest: float) -> tuple[str, float, str]:
    """The sign, the factor and the word in which counts up to `highest` read well: ("k", 1000, "thousand")."""
    units = (("G", 1e9, "billion"), ("M", 1e6, "million"), ("k", 1e3, "thousand"))
    return next((unit for unit in units if highest >= 2 * unit[1]), ("", 1.0, ""))


def clock(run: Run) -> Clock:
    """The clock of a run, from all of its records."""
    steps = np.array(sorted({0.0} | {number(record, "rollout") for record in (*run.evaluations, *run.metrics)}))
    seconds, passes = _spent(run, "seconds", steps), _spent(run, "network_evaluations", steps)
    others = []
    if seconds is not None:
        unit, scale = time_unit(float(seconds[-1]))
        name = {"s": "seconds", "min": "minutes", "h": "hours"}[unit]
        others.append(Spent(f"{name} of training", unit, seconds / scale))
    if passes is not None:
        sign, factor, word = count_unit(float(passes[-1]))
        others.append(Spent(f"{word} network evaluations".strip(), sign, passes / factor))
    return Clock(steps, tuple(others))


def _spent(run: Run, key: str, steps: Array) -> Array | None:
    """What was spent by these steps, straight between those logged; none where nothing was logged."""
    logged = sorted((number(r, "rollout"), number(r, key)) for r in (*run.evaluations, *run.metrics) if number(r, key) >= 0)
    known = {0.0: 0.0} | {step: value for step, value in logged if math.isfinite(value)}
    # whatever the files say, neither time nor work runs backwards
    values = np.maximum.accumulate(np.array(list(known.values())))
    return np.interp(steps, np.array(list(known)), values) if values[-1] > 1e-100 else None
