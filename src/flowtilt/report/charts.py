"""Line charts as inline SVG that keeps its text size at any width.

The SVG has no viewBox: places are percentages of the plot, so ticks and dots neither shrink on a
telephone nor grow on a desk. Only paths cannot speak in percent; they live in a nested SVG that is
stretched, with strokes that are not. Labels stand in the margin, outside the SVG's own box.
"""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from html import escape

from flowtilt.report.axes import Axis, thin
from flowtilt.report.numbers import Array

UNITS = 1000  # of the stretched SVG that holds the paths
LETTER = 2.2  # width of a digit in percent of a plot on a telephone, about 300 px


@dataclass(frozen=True)
class Curve:
    """One curve: x and y [N]; NaN is a gap. `band` is (low, high) [N]; `read` [N] are the texts shown on hovering.

    `tone` is a class of the style sheet that gives the curve a colour of its own.
    """

    x: Array
    y: Array
    look: str = "strong"  # or "faint"
    dots: bool = False
    band: tuple[Array, Array] | None = None
    read: Sequence[str] = ()
    tone: str = ""


@dataclass(frozen=True)
class Flag:
    """A guard that fired, as a mark on a curve."""

    x: float
    y: float
    text: str
    tone: str


@dataclass(frozen=True)
class Chart:
    """Curves on common axes. `label` is what a screen reader says; `marks` are (x, text) of guards that fired.

    Where there are several runs, their guards are `flags` on the curves instead. `levels` are (y, text) of scores to reach.
    """

    label: str
    curves: Sequence[Curve]
    x: Axis
    y: Axis
    x_unit: str = ""
    marks: Sequence[tuple[float, str]] = field(default=())
    flags: Sequence[Flag] = ()
    levels: Sequence[tuple[float, str]] = ()
    height: int = 230  # px
    points: int = 400  # a curve, about; longer ones are thinned
    clock: str = ""  # which ticks of the page's chosen axis it has, "ticks" or "few"; none where x is not rollouts

    def svg(self) -> str:
        """The chart as HTML: a box with margins for the labels and, in it, the SVG."""
        gutter = max(14 + 7 * max((len(label) for _, label in self.y.ticks), default=1), 56 if self.x_unit else 0)
        parts = [
            self._grid(),
            *(_toned(c, self._band(c)) for c in self.curves),
            self._levels(),
            *(_toned(c, self._line(c)) for c in self.curves),
            self._marks(),
            self._flags(),
            self._x_labels(),
        ]
        clock = f' data-clock="{self.clock}"' if self.clock else ""
        reads = self._reads([c for c in self.curves if c.read])
        return (
            f'<div class="plot" style="height:{self.height}px;margin:10px 18px 30px {gutter}px"{reads}{clock}>'
            f'<svg role="img" aria-label="{escape(self.label)}">{"".join(parts)}</svg></div>'
        )

    def _grid(self) -> str:
        rows = []
        for value, label in self.y.ticks:
            y = _p(100 - self.y.percent(value))
            rows.append(f'<line class="rule" x2="100%" y1="{y}" y2="{y}"/>')
            rows.append(f'<text class="tick" x="-8" y="{y}" dy=".33em" text-anchor="end">{label}</text>')
        return "".join(rows)

    def _x_labels(self) -> str:
        parts, taken = [], -math.inf
        if self.x_unit and self.x.ticks:
            parts.append(f'<text class="tick" x="-10" y="100%" dy="18" text-anchor="end">{self.x_unit}</text>')
        for value, label in self.x.ticks:
            at = self.x.percent(value)
            half = LETTER * len(label) / 2
            if at - half < taken or at > 100.01:
                continue
            taken = at + half + LETTER
            parts.append(f'<text class="tick" x="{_p(at)}" y="100%" dy="18" text-anchor="middle">{label}</text>')
        return f'<g class="x-ticks">{"".join(parts)}</g>'

    def _marks(self) -> str:
        placed = [(_p(self.x.percent(x)), escape(text)) for x, text in self.marks]
        return "".join(
            f'<g class="mark"><title>{text}</title><line x1="{x}" x2="{x}" y1="0" y2="100%"/><circle cx="{x}" cy="0" r="4"/></g>'
            for x, text in placed
        )

    def _levels(self) -> str:
        placed = [(_p(100 - self.y.percent(y)), escape(text)) for y, text in self.levels]
        return "".join(
            f'<g class="level"><line x2="100%" y1="{y}" y2="{y}"/><text x="4" y="{y}" dy="-5">{text}</text></g>' for y, text in placed
        )

    def _flags(self) -> str:
        placed = [(flag, _p(self.x.percent(flag.x)), _p(100 - self.y.percent(flag.y))) for flag in self.flags]
        return "".join(
            f'<g class="flag {flag.tone}"><title>{escape(flag.text)}</title>'
            f'<svg x="{x}" y="{y}" width="1" height="1"><path d="M0-7L6.5 4.5L-6.5 4.5Z"/></svg></g>'
            for flag, x, y in placed
        )

    def _points(self, curve: Curve, ys: Array) -> list[tuple[float, float]]:
        """Percent from the left and from the top, NaN where there is a gap."""
        return [(self.x.percent(float(curve.x[i])), 100 - self.y.percent(float(ys[i]))) for i in thin(curve.y, self.points)]

    def _line(self, curve: Curve) -> str:
        points = self._points(curve, curve.y)
        runs = _unbroken(points)
        path = "".join("M" + "L".join(_xy(point) for point in run) for run in runs if len(run) > 1)
        # a value between two gaps has no line to be seen by
        dots = [p for run in runs for p in run if curve.dots or len(run) == 1]
        circles = "".join(f'<circle class="dot {curve.look}" cx="{_p(x)}" cy="{_p(y)}" r="{3.5 if curve.dots else 2.5}"/>' for x, y in dots)
        return (_stretched(f'<path class="line {curve.look}" vector-effect="non-scaling-stroke" d="{path}"/>') if path else "") + circles

    def _band(self, curve: Curve) -> str:
        if curve.band is None:
            return ""
        low, high = (self._points(curve, edge) for edge in curve.band)
        shapes = []
        for run in _unbroken([(x, a + b) for (x, a), (_, b) in zip(low, high, strict=True)]):
            inside = {x for x, _ in run}
            outline = [p for p in low if p[0] in inside] + [p for p in reversed(high) if p[0] in inside]
            shapes.append("M" + "L".join(_xy(point) for point in outline) + "Z")
        return _stretched(f'<path class="band" d="{"".join(shapes)}"/>') if shapes else ""

    def _reads(self, curves: Sequence[Curve]) -> str:
        points = []
        for curve in curves:
            texts = [curve.read[i] for i in thin(curve.y, self.points)]
            placed = zip(self._points(curve, curve.y), texts, strict=True)
            points += [(round(x, 2), round(y, 2), text) for (x, y), text in placed if math.isfinite(x + y)]
        if not curves:
            return ""
        # among several curves the nearest point counts, of one the nearest to the left or right
        several = " data-several" if len(curves) > 1 else ""
        return f'{several} data-read="{escape(json.dumps(points, ensure_ascii=False, separators=(",", ":")))}"'


def _toned(curve: Curve, svg: str) -> str:
    return f'<g class="{curve.tone}">{svg}</g>' if curve.tone and svg else svg


def _unbroken(points: Sequence[tuple[float, float]]) -> list[list[tuple[float, float]]]:
    """The stretches between gaps."""
    runs: list[list[tuple[float, float]]] = [[]]
    for x, y in points:
        if math.isfinite(x + y):
            runs[-1].append((x, y))
        elif runs[-1]:
            runs.append([])
    return [run for run in runs if run]


def _p(percent: float) -> str:
    return f"{percent:.2f}%"


def _xy(point: tuple[float, float]) -> str:
    return f"{point[0] * UNITS / 100:.1f} {point[1] * UNITS / 100:.1f}"


def _stretched(inner: str) -> str:
    return f'<svg class="stretched" width="100%" height="100%" viewBox="0 0 {UNITS} {UNITS}" preserveAspectRatio="none">{inner}</svg>'
