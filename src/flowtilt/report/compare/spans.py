"""How far runs got for what they spent: crossings, and medians and spans over seeds.

A run's curve is x, y [N]: what was spent by each evaluation, never falling, and its score. Between two evaluations
the curve is straight; nothing is known beyond the last. A cost that was never enough is infinite.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from flowtilt.estimate import NOTHING, Estimate
from flowtilt.report.numbers import Array

Line = tuple[Array, Array]


class Ratio(NamedTuple):
    """A method's median cost over the baseline's, with the least and greatest ratio of one run of each.

    `bound` says what is known where half the runs of one of the two never got there. "<" or ">": the ratio is less or more
    than the value. "method" or "baseline": that one ended, at so many times the other's cost, before the other got there,
    and nothing is known of the ratio. Both may have failed, or the baseline may have got there for nothing: NaN. An end
    that depends on a run that never got there is 0 or infinite.
    """

    of: Estimate
    bound: str = ""


class Ribbon(NamedTuple):
    """Median, lowest and highest score [M] of several curves where all of them are known, x [M]."""

    x: Array
    median: Array
    low: Array
    high: Array


def span(values: Sequence[float] | Array) -> Estimate:
    """Median, lowest and highest of N > 0 values; infinite ones count as the highest."""
    found = np.asarray(values, dtype=float)
    return Estimate(float(np.median(found)), float(found.min()), float(found.max()))


def crossing(x: Array, y: Array, target: float) -> float:
    """The cost at which a curve first reaches `target`, infinite where it never does.

    Between evaluations i - 1 and i, the first with y_i >= target: x_{i-1} + (x_i - x_{i-1}) (target - y_{i-1}) / (y_i - y_{i-1}).
    """
    reached = np.flatnonzero(y >= target)
    if not len(reached):
        return math.inf
    i = int(reached[0])
    if i == 0:
        return float(x[0])
    share = (target - y[i - 1]) / (y[i] - y[i - 1])
    return float(x[i - 1] + share * (x[i] - x[i - 1]))


def ratio(costs: Array, spent: Array, base_costs: Array, base_spent: Array) -> Ratio:
    """How many times the baseline's cost a method needs.

    Args:
        costs, base_costs: [S] and [B], to get somewhere; infinite where never.
        spent, base_spent: [S] and [B], all that each run spent: what never was enough costs more than that.
    """
    mine, base = float(np.median(costs)), float(np.median(base_costs))
    if base == 0 or (math.isinf(mine) and math.isinf(base)):
        return Ratio(NOTHING)
    if math.isinf(base):
        known = mine / float(np.median(np.minimum(base_costs, base_spent)))
        return Ratio(Estimate(known), "<" if known <= 1 else "baseline")
    if math.isinf(mine):
        known = float(np.median(np.minimum(costs, spent))) / base
        return Ratio(Estimate(known), ">" if known >= 1 else "method")
    least, greatest = float(base_costs.min()), float(base_costs.max())
    # finite medians leave the least cost of each finite, so no infinity is divided by another
    return Ratio(Estimate(mine / base, float(costs.min()) / greatest, float(costs.max()) / least if least else math.inf))


def ribbon(curves: Sequence[Line]) -> Ribbon:
    """The median of several curves and their span, at every evaluation of any of them, where all of them are known."""
    first, last = max(x[0] for x, _ in curves), min(x[-1] for x, _ in curves)
    everywhere = np.unique(np.concatenate([x for x, _ in curves]))
    grid = everywhere[(everywhere >= first) & (everywhere <= last)]
    scores = np.array([np.interp(grid, x, y) for x, y in curves])
    return Ribbon(grid, np.median(scores, axis=0), scores.min(0), scores.max(0))
