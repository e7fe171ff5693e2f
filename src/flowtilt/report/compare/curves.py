"""The curves of a comparison: a method's median over its seeds, their span, and each seed."""

from dataclasses import dataclass
from functools import cached_property

import numpy as np

from flowtilt.estimate import Estimate
from flowtilt.report.axes import value_axis
from flowtilt.report.charts import Chart, Curve, Flag
from flowtilt.report.compare.comparison import Comparison
from flowtilt.report.compare.costs import COSTS, Unit, spent
from flowtilt.report.compare.methods import Method
from flowtilt.report.compare.spans import Ribbon, ribbon
from flowtilt.report.compare.tables import phrase, score_cell, score_digits
from flowtilt.report.numbers import fixed, number, short

TONES = 7
"""Colours; the eighth method has the first one's again, dashed."""


def tone(place: int) -> str:
    """Classes of the style sheet for the method at this place."""
    return f"m{place % TONES}" + (" again" if place >= TONES else "")


def score_chart(comparison: Comparison, cost: str) -> str:
    """Score against a cost, all methods in one chart."""
    unit, digits = comparison.unit(cost), score_digits(comparison)
    pens = [_Pen(method, tone(place), cost, unit, digits) for place, method in enumerate(comparison.methods)]
    medians = [pen.median() for pen in pens]
    chart = Chart(
        label=f"Score against {unit.name}. {'; '.join(pen.spoken() for pen in pens)}",
        curves=[*(curve for pen in pens for curve in pen.seeds()), *medians],
        x=unit.axis(comparison.longest(cost)),
        y=value_axis([*(entry.scores for entry in comparison.entries), np.array(comparison.targets)], 6),
        flags=[flag for pen in pens for flag in pen.flags()],
        levels=[(target, short(target)) for target in comparison.targets],
        height=340,
    )
    return f'<p class="axis-name">score</p>{chart.svg()}<p class="axis-name x">{unit.name}</p>'


@dataclass(frozen=True)
class _Pen:
    """Draws one method against one cost."""

    method: Method
    tone: str
    cost: str
    unit: Unit
    digits: int

    @cached_property
    def ribbon(self) -> Ribbon:
        return ribbon([entry.line(self.cost) for entry in self.method.entries])

    def median(self) -> Curve:
        found, entries = self.ribbon, self.method.entries
        cells = [score_cell(Estimate(*scores), self.digits) for scores in zip(found.median, found.low, found.high, strict=True)]
        reads = [self._read(phrase(cell), x) for cell, x in zip(cells, found.x, strict=True)]
        # between evaluations there is nothing to put a dot on
        measured = all(np.isin(found.x, entry.costs[self.cost]).all() for entry in entries)
        band = (found.low, found.high) if len(entries) > 1 else None
        return Curve(found.x / self.unit.factor, found.median, dots=measured, band=band, read=reads, tone=self.tone)

    def seeds(self) -> list[Curve]:
        """Each seed, where there are several."""
        found = []
        for entry in self.method.entries if len(self.method.entries) > 1 else ():
            x, y = entry.line(self.cost)
            reads = [self._read(f"seed {entry.seed}: {fixed(score, self.digits)}", at) for at, score in zip(x, y, strict=True)]
            found.append(Curve(x / self.unit.factor, y, "faint", read=reads, tone=self.tone))
        return found

    def flags(self) -> list[Flag]:
        """Guards that fired, each on its own seed's curve."""
        found = []
        for entry in self.method.entries:
            for guard in entry.run.guards:
                x = spent(entry.run, self.cost, np.array([number(guard, "rollout")]))
                if np.isfinite(x).all():
                    y = float(np.interp(x[0], *entry.line(self.cost)))
                    whose = f"{self.method.label}, seed {entry.seed}"
                    text = f"{guard.get('guard', 'guard')} at rollout {number(guard, 'rollout'):,.0f} ({whose}): {guard.get('message', '')}"
                    found.append(Flag(float(x[0]) / self.unit.factor, y, text, self.tone))
        return found

    def spoken(self) -> str:
        """What a screen reader says of the method."""
        found = self.ribbon
        ends = [f"{fixed(float(found.median[i]), self.digits)} at {self.unit.written(float(found.x[i]))}" for i in (0, -1)]
        return f"{self.method.label}: {' to '.join(ends)}"

    def _read(self, score: str, cost: float) -> str:
        return f"{self.method.label} · {score} · {self.unit.written(cost)} {COSTS[self.cost].behind}"
