"""The maths of a comparison: crossings, medians and spans, ratios with what is not known of them."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flowtilt.estimate import Estimate
from flowtilt.report.compare.spans import Ratio, crossing, ratio, ribbon, span

INF = math.inf


def line(*points):
    return np.array([x for x, _ in points], dtype=float), np.array([y for _, y in points], dtype=float)


curves = st.lists(st.tuples(st.floats(0.01, 10), st.floats(-1, 1)), min_size=2, max_size=8).map(
    lambda steps: (np.cumsum([dx for dx, _ in steps]), np.array([y for _, y in steps]))
)


def test_a_crossing_lies_on_the_straight_line_between_evaluations():
    assert crossing(*line((0, 0.2), (10, 0.4), (20, 0.8)), 0.5) == pytest.approx(12.5)


def test_the_first_crossing_counts_though_the_score_falls_again():
    assert crossing(*line((0, 0.0), (1, 0.6), (2, 0.1), (3, 0.9)), 0.3) == pytest.approx(0.5)


def test_a_score_that_is_met_exactly_is_reached_and_one_missed_by_a_hair_is_not():
    curve = line((0, 0.1), (4, 0.9))
    assert crossing(*curve, 0.9) == 4 and crossing(*curve, np.nextafter(0.9, 1)) == INF


def test_what_the_base_can_already_costs_nothing():
    assert crossing(*line((0, 0.5), (4, 0.9)), 0.5) == 0 and crossing(*line((0, 0.5)), 0.6) == INF


@settings(deadline=None)
@given(curve=curves, low=st.floats(-1, 1), high=st.floats(-1, 1))
def test_a_crossing_is_on_the_curve_and_a_higher_score_is_never_sooner(curve, low, high):
    low, high = sorted((low, high))
    first, later = crossing(*curve, low), crossing(*curve, high)
    assert first <= later
    if curve[0][0] < first < INF:
        assert np.interp(first, *curve) == pytest.approx(low, abs=1e-9)
        before = curve[1][curve[0] < first - 1e-9]
        assert (before < low).all()


def test_a_run_that_never_got_there_counts_as_later_than_all():
    assert span([3.0, INF, 1.0])[:3] == (3.0, 1.0, INF)
    assert span([3.0, INF, 1.0, INF]).value == INF
    assert span([3.0, 1.0])[:3] == (2.0, 1.0, 3.0)


def test_a_ratio_spans_all_pairs_of_runs():
    found = ratio(np.array([1.0, 2.0, 4.0]), np.full(3, 9.0), np.array([4.0, 8.0]), np.full(2, 9.0))
    assert found == Ratio(Estimate(2 / 6, 1 / 8, 4 / 4))


def test_a_ratio_is_a_bound_where_half_the_runs_of_one_side_never_got_there():
    got, spent = np.array([10.0]), np.array([40.0])
    below = ratio(got, spent, np.array([INF]), np.array([40.0]))
    above = ratio(np.array([INF]), np.array([40.0]), got, spent)
    assert below.of.value == 0.25 and below.bound == "<" and above.of.value == 4 and above.bound == ">"
    neither = ratio(np.array([INF]), spent, np.array([INF]), spent)
    assert math.isnan(neither.of.value) and not neither.bound


def test_nothing_is_known_of_a_ratio_where_one_ended_before_the_other_got_there():
    got, spent, ended = np.array([10.0]), np.array([40.0]), np.array([8.0])
    assert ratio(np.array([INF]), ended, got, spent) == Ratio(Estimate(0.8), "method")
    assert ratio(got, spent, np.array([INF]), ended) == Ratio(Estimate(1.25), "baseline")


def test_the_ends_of_a_ratio_are_open_where_a_single_run_never_got_there():
    found = ratio(np.array([1.0, 2.0, INF]), np.full(3, 9.0), np.array([4.0, 8.0, INF]), np.full(3, 9.0))
    assert found == Ratio(Estimate(2 / 8, 0.0, INF))
    free = ratio(np.array([1.0]), np.array([9.0]), np.array([0.0]), np.array([9.0]))
    assert math.isnan(free.of.value), "what the baseline had for nothing has no multiple"


def test_seeds_are_interpolated_where_another_was_evaluated_and_followed_as_far_as_all_go():
    found = ribbon([line((0, 0.0), (10, 1.0)), line((0, 0.0), (5, 0.1), (8, 0.4)), line((0, 0.2), (10, 0.2))])
    assert found.x.tolist() == [0, 5, 8]
    assert found.median == pytest.approx([0.0, 0.2, 0.4])
    assert found.low == pytest.approx([0.0, 0.1, 0.2]) and found.high == pytest.approx([0.2, 0.5, 0.8])


@settings(deadline=None)
@given(curve=curves)
def test_the_median_of_equal_seeds_is_each_of_them(curve):
    found = ribbon([curve, curve, curve])
    for scores in found[1:]:
        assert scores == pytest.approx(curve[1])
    assert found.x == pytest.approx(curve[0])
