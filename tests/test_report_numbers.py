"""Ticks, thinning and rounding of the report."""

import math

import numpy as np
import pytest

from flowtilt.report.axes import nice_step, round_ticks, thin, value_axis
from flowtilt.report.numbers import duration, short


@pytest.mark.parametrize(("low", "high"), [(0.0, 1.0), (-3.2, 17.0), (1e-7, 4e-7), (2.1e6, 9e6), (0.93, 0.94), (-5.0, -4.0), (0.0, 1e99)])
def test_ticks_are_few_round_and_distinct(low: float, high: float) -> None:
    axis = value_axis([np.array([low, high, np.nan])])
    labels = [label for _, label in axis.ticks]
    assert axis.low <= low < high <= axis.high and 2 <= len(labels) <= 8 and len(set(labels)) == len(labels)
    assert all(len(label) <= 10 for label in labels)


def test_a_step_of_ticks_is_one_two_or_five() -> None:
    assert [nice_step(span, 5) for span in (1.0, 3.0, 60.0, 0.9)] == pytest.approx([0.2, 1.0, 20.0, 0.2])
    assert [label for _, label in round_ticks(0, 1, 0.5)] == ["0", "0.5", "1.0"]


def test_thinning_keeps_the_ends_and_the_extremes() -> None:
    values = np.sin(np.arange(10_000) / 50)
    values[1234], values[8765] = 5.0, -5.0
    values[3000:4000] = np.nan
    kept = thin(values, 400)
    assert {0, 1234, 8765, 9999} <= set(kept) and len(kept) <= 402 and kept == sorted(kept)
    assert any(math.isnan(values[i]) for i in kept)


def test_numbers_are_rounded_to_what_they_mean() -> None:
    assert [short(v) for v in (0.123456, 1234.5, 1.5e-4, 7.6e7, math.nan, 0.0)] == ["0.123", "1,234", "1.5×10⁻⁴", "76 M", "–", "0"]
    assert [duration(s) for s in (5.31, 58.1, 750, 11_500)] == ["5.3 s", "58 s", "12.5 min", "3.2 h"]
