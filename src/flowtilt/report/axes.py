"""Axes with round ticks, and thinning of long curves."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from flowtilt.report.numbers import Array, scientific

TINY = 1e-100  # smaller spans have no power of ten to cut them by


@dataclass(frozen=True)
class Axis:
    """A range of values and (value, label) ticks within it."""

    low: float
    high: float
    ticks: tuple[tuple[float, str], ...]

    def percent(self, value: float) -> float:
        """Where a value stands, 0 at `low` and 100 at `high`."""
        return 100 * (value - self.low) / (self.high - self.low)


def nice_step(span: float, count: int) -> float:
    """The finest of 1, 2, 5 times a power of ten that cuts `span` into at most `count` pieces."""
    power = 10.0 ** math.floor(math.log10(span / count))
    return next(power * m for m in (1, 2, 5, 10, 20) if span <= power * m * count * (1 + 1e-9))


def round_ticks(low: float, high: float, step: float) -> tuple[tuple[float, str], ...]:
    """(value, label) of the multiples of `step` in [low, high], labelled with just the decimals that the step needs."""
    first, last = math.ceil(low / step - 1e-6), math.floor(high / step + 1e-6)
    values = [i * step for i in range(first, last + 1)]
    if max(abs(low), abs(high)) >= 1e6 or step < 1e-4:
        return tuple((value, scientific(value, 2) if value else "0") for value in values)
    decimals = max(0, -math.floor(math.log10(step) + 1e-9))
    return tuple((value, f"{value:,.{decimals}f}" if value else "0") for value in values)


def value_axis(values: Sequence[Array], count: int = 5) -> Axis:
    """A y axis round all finite values, its ends on ticks."""
    finite = np.concatenate([np.zeros(0), *(v[np.isfinite(v)] for v in values)])
    low, high = (float(finite.min()), float(finite.max())) if len(finite) else (0.0, 1.0)
    constant = high - low <= 1e-9 * max(abs(low), abs(high))
    # a curve that comes near zero is read against zero, and so is one that is flat
    if constant or 0 < low < 0.4 * high:
        low, high = min(0.0, low), max(0.0, high)
    if high - low < TINY:
        low, high = 0.0, 1.0
    step = nice_step(high - low, count)
    low, high = step * math.floor(low / step + 1e-6), step * math.ceil(high / step - 1e-6)
    return Axis(low, high, round_ticks(low, high, step))


def unit_axis(count: int = 5) -> Axis:
    """The y axis of scores: 0 to 1."""
    return Axis(0.0, 1.0, round_ticks(0.0, 1.0, nice_step(1.0, count)))


def thin(values: Array, limit: int) -> list[int]:
    """Indices of at most about `limit` of N values that keep the ends, every stretch's extremes, and gaps as long as a stretch."""
    if len(values) <= limit:
        return list(range(len(values)))
    kept = {0, len(values) - 1}
    for part in np.array_split(np.arange(len(values)), limit // 2):
        known = part[np.isfinite(values[part])]
        kept |= {int(known[values[known].argmin()]), int(known[values[known].argmax()])} if len(known) else {int(part[0])}
    return sorted(kept)
