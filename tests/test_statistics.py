"""Intervals cover what they promise to, whatever the rows' order, and never take images of one prompt for independent."""

import json
import math
import subprocess
import sys

import numpy as np
import pytest

from flowtilt.statistics import interval, mean_of_strata, paired, summary

NAN = math.nan


def images(seed: int, prompts: int = 40, copies: int = 4, strata: int = 1, within: float = 1.0) -> tuple[np.ndarray, ...]:
    """values, clusters, strata: each prompt has a normal level of its own, its images are normal around it."""
    rng = np.random.default_rng(seed)
    clusters = np.repeat(np.arange(prompts * strata), copies)
    tags = clusters % strata
    levels = rng.normal(size=prompts * strata)
    return levels[clusters] + within * rng.normal(size=len(clusters)) + 3.0 * tags, clusters, tags


def plain(values: np.ndarray) -> float:
    """1.96 standard errors of a mean of independent values."""
    return 1.959964 * float(values.std(ddof=1)) / math.sqrt(len(values))


# the interval ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("prompts", "strata"), [(60, 1), (15, 6)])
def test_about_95_of_100_intervals_hold_the_true_mean(prompts: int, strata: int) -> None:
    trials, truth = 600, 3.0 * (strata - 1) / 2
    held = 0
    for seed in range(trials):
        low, high = interval(*images(seed, prompts, strata=strata), resamples=400, seed=seed)
        held += low <= truth <= high
    # three standard deviations of a binomial, and the point that percentiles of some 60 clusters are known to lack
    spread = 3 * math.sqrt(0.95 * 0.05 / trials)
    assert 0.94 - spread < held / trials < 0.95 + spread


def test_of_single_images_it_is_the_plain_formulas() -> None:
    values = np.random.default_rng(1).normal(2.0, 3.0, 400)
    low, high = interval(values, np.arange(400), resamples=20_000)
    assert (low + high) / 2 == pytest.approx(values.mean(), abs=0.03 * plain(values))
    assert (high - low) / 2 == pytest.approx(plain(values), rel=0.03)


def test_in_small_strata_it_is_the_stratified_formulas_unbiased_one() -> None:
    """Six tags of six prompts: drawing all six would give an interval sqrt(6 / 5), or 9.5 %, too narrow."""
    values, clusters, tags = images(2, prompts=6, copies=1, strata=6)
    parts = [values[tags == tag] for tag in range(6)]
    error = math.sqrt(sum(float(part.var(ddof=1)) / 6 for part in parts)) / 6
    low, high = interval(values, clusters, tags, resamples=40_000)
    assert (high - low) / 2 == pytest.approx(1.959964 * error, rel=0.03)


def test_strata_keep_the_difference_between_tags_out() -> None:
    values, clusters, tags = images(3, strata=4)
    within, across = interval(values, clusters, tags), interval(values, clusters)
    assert within[1] - within[0] < 0.5 * (across[1] - across[0])


def test_copies_of_an_image_are_no_evidence() -> None:
    values = np.random.default_rng(4).normal(size=50)
    once = interval(values, np.arange(50))
    four_times = interval(np.repeat(values, 4), np.repeat(np.arange(50), 4))
    assert four_times == pytest.approx(once, abs=1e-12)
    naive = interval(np.repeat(values, 4), np.arange(200))
    assert (naive[1] - naive[0]) == pytest.approx((once[1] - once[0]) / 2, rel=0.1)


def test_the_order_of_the_rows_does_not_matter_to_the_last_bit() -> None:
    values, clusters, tags = images(5, strata=3)
    values[::7] = NAN
    order = np.random.default_rng(0).permutation(len(values))
    assert interval(values[order], clusters[order], tags[order]) == interval(values, clusters, tags)
    assert summary(values[order], clusters[order], tags[order]) == summary(values, clusters, tags)


def test_missing_values_are_left_out() -> None:
    values, clusters, tags = images(6, strata=2)
    values[[0, 5, 80]] = NAN
    values[clusters == 9] = NAN
    known = ~np.isnan(values)
    assert interval(values, clusters, tags) == interval(values[known], clusters[known], tags[known])


@pytest.mark.parametrize("value", [0.1, 0.0, 1.0, -3.3e7])
def test_equal_values_have_no_interval_and_say_so(value: float) -> None:
    """One without width would be a certainty that nobody has."""
    values = np.full(30, value)
    assert all(map(math.isnan, interval(values, np.arange(30) // 3, np.arange(30) % 2)))
    found = summary(values, np.arange(30) // 3)
    assert (found["mean"], found["low"], found["high"], found["interval"]) == (value, None, None, "alike")


@pytest.mark.parametrize("values", [[], [NAN, NAN], [0.5, 0.7], [0.5, NAN, 0.7]])
def test_one_prompt_or_none_has_no_interval(values: list[float]) -> None:
    assert all(map(math.isnan, interval(values, [7] * len(values))))


def test_tags_of_one_prompt_each_have_no_interval() -> None:
    assert all(map(math.isnan, interval([0.1, 0.9], [0, 1], ["a", "b"])))


def test_prompts_and_tags_may_be_any_labels() -> None:
    values, clusters, tags = images(7, strata=3)
    prompts = [f"a prompt, nümber {c:03d}" for c in clusters]
    assert interval(values, prompts, [f"tag {tag}" for tag in tags]) == interval(values, clusters, tags)


def test_it_is_a_function_of_its_seed() -> None:
    values, clusters, tags = images(8, strata=2)
    state = repr(np.random.get_state())
    assert interval(values, clusters, tags, seed=3) == interval(values, clusters, tags, seed=3)
    assert interval(values, clusters, tags, seed=3) != interval(values, clusters, tags, seed=4)
    assert repr(np.random.get_state()) == state


def test_many_prompts_are_drawn_in_parts_of_equal_law() -> None:
    """More than 2^20 draws: the interval is still the plain formula's."""
    values = np.random.default_rng(9).normal(size=3000)
    low, high = interval(values, np.arange(3000), resamples=2000)
    assert (high - low) / 2 == pytest.approx(plain(values), rel=0.06)


def test_a_higher_level_is_wider() -> None:
    values, clusters, tags = images(10)
    widths = [np.diff(interval(values, clusters, tags, level=level))[0] for level in (0.5, 0.8, 0.95, 0.99)]
    assert widths == sorted(widths) and widths[0] > 0


@pytest.mark.parametrize(
    "wrong",
    [
        {"clusters": [0, 1]},
        {"strata": [0]},
        {"values": [1.0, math.inf, 2.0]},
        {"level": 1.0},
        {"bounds": (0.0, 1.0)},
        {"resamples": 0},
        {"values": [[1.0], [2.0], [3.0]]},
    ],
)
def test_what_makes_no_sense_is_refused(wrong: dict) -> None:
    with pytest.raises(ValueError):
        interval(**({"values": [1.0, 2.0, 3.0], "clusters": [0, 1, 2], "strata": [0, 0, 0]} | wrong))


# how many prompts an interval needs ------------------------------------------------------------------


@pytest.mark.parametrize("prompts", [1, 2, 9, 10, 11])
@pytest.mark.parametrize("bounds", [None, (0.0, 1.0)])
@pytest.mark.parametrize("alike", [True, False])
def test_below_ten_prompts_there_is_none_however_many_images(prompts: int, bounds: tuple[float, float] | None, alike: bool) -> None:
    clusters = np.repeat(np.arange(prompts), 50)
    values = np.ones(len(clusters)) if alike else np.random.default_rng(0).uniform(size=len(clusters))
    found = summary(values, clusters, bounds=bounds)
    assert (found["low"] is not None) == (prompts >= 10 and not (alike and bounds is None))
    assert found["prompts"] == prompts and (found.get("interval") == "few") == (prompts < 10)
    assert (paired(values, values / 2, clusters)["low"] is not None) == (prompts >= 10 and not alike)


def test_a_prompt_without_a_score_is_no_prompt() -> None:
    values = np.random.default_rng(0).normal(size=20)
    values[:4] = NAN
    assert summary(values, np.arange(20) // 2)["interval"] == "few"


def test_tags_of_few_prompts_are_resampled_as_one() -> None:
    """Thirty prompts of a tag that are all right do not hide that the other tag's two differ, and tags of one prompt count."""
    values, tags = np.array([1.0] * 30 + [0.0, 1.0]), np.array([0] * 30 + [1] * 2)
    found = summary(values, np.arange(32), tags, bounds=(0, 1))
    assert (found["low"], found["high"]) == interval(values, np.arange(32))
    assert found["mean_of_tags"]["interval"] == "thin" and found["by_tag"]["1"]["interval"] == "few"
    values = np.random.default_rng(0).normal(size=12)
    assert interval(values, np.arange(12), np.arange(12)) == interval(values, np.arange(12))


@pytest.mark.parametrize("prompts", [10, 20])
def test_of_few_prompts_about_90_of_100_intervals_hold_the_true_mean(prompts: int) -> None:
    """Images of a prompt are alike: taken for independent, half of these intervals would fail."""
    held = naive = 0
    for seed in range(400):
        values, clusters, _ = images(seed, prompts, copies=8, within=0.3)
        low, high = interval(values, clusters, resamples=300, seed=seed)
        held += low <= 0 <= high
        naive += abs(values.mean()) <= plain(values)
    assert held / 400 > 0.88 and naive / 400 < 0.6


# where all are alike ---------------------------------------------------------------------------------


@pytest.mark.parametrize("prompts", [10, 20, 553])
def test_of_nothing_but_right_or_wrong_prompts_the_bound_is_clopper_and_pearsons(prompts: int) -> None:
    """0.025^(1 / n), for 20 of 20: [0.8316, 1]. Images of one prompt count as one."""
    clusters = np.repeat(np.arange(prompts), 4)
    low, high = interval(np.ones(4 * prompts), clusters, bounds=(0, 1))
    assert (low, high) == (pytest.approx(0.025 ** (1 / prompts)), 1.0)
    assert interval(np.zeros(4 * prompts), clusters, bounds=(0, 1)) == pytest.approx((0.0, 1 - low))
    assert interval(np.full(4 * prompts, 7.0), clusters, bounds=(3, 7)) == pytest.approx((3 + 4 * low, 7))


@pytest.mark.parametrize("sizes", [(5, 5, 5), (3, 9, 20)])
def test_such_a_bound_fails_in_at_most_2_5_of_100(sizes: tuple[int, ...]) -> None:
    """Exactly: of all true rates in three tags, the one that scores all right most often while its mean lies below the bound."""
    tags = np.repeat(np.arange(3), sizes)
    ones, clusters = np.ones(len(tags)), np.arange(len(tags))
    rates = np.stack(np.meshgrid(*[np.linspace(0, 1, 101)] * 3)).reshape(3, -1)
    chance = np.prod(rates ** np.array(sizes)[:, None], 0)
    over_images, _ = interval(ones, clusters, tags, bounds=(0, 1))
    over_tags = mean_of_strata(ones, clusters, tags, bounds=(0, 1)).low
    worst = [
        chance[np.array(w) @ rates < low].max() for w, low in ((np.array(sizes) / sum(sizes), over_images), (np.ones(3) / 3, over_tags))
    ]
    assert all(w <= 0.025 for w in worst) and max(worst) > 0.02


def test_tags_that_are_alike_each_at_a_level_of_its_own_are_bounded_too() -> None:
    values, tags = np.array([1.0] * 10 + [0.0] * 10), np.repeat([0, 1], 10)
    low, high = interval(values, np.arange(20), tags, bounds=(0, 1))
    off = 1 - 0.025 ** (1 / 20)
    assert (low, high) == pytest.approx((0.5 - off, 0.5 + off))
    assert all(map(math.isnan, interval(values, np.arange(20), tags)))


def test_pairs_that_all_tie_may_differ_in_another_draw() -> None:
    found = paired(np.ones(20), np.ones(20), np.arange(20), bounds=(0, 1))
    off = 1 - 0.025 ** (1 / 20)
    assert (
        (found["mean"], found["low"], found["high"]) == pytest.approx((0, -off, off))
        and found["interval"] == "exact"
        and found["ties"] == 1
    )
    won = paired(np.ones(20), np.zeros(20), np.arange(20), bounds=(0, 1))
    assert (won["low"], won["high"]) == pytest.approx((1 - 2 * off, 1))
    assert paired(np.ones(20), np.ones(20), np.arange(20))["low"] is None


def test_one_prompt_that_differs_makes_it_a_bootstrap_again() -> None:
    values = np.array([1.0] * 19 + [0.0])
    found = summary(values, np.arange(20), bounds=(0, 1))
    assert "interval" not in found and (found["low"], found["high"]) == interval(values, np.arange(20))
    in_pairs = np.tile([0.0, 1.0], 20)  # every prompt's mean is 0.5
    assert summary(in_pairs, np.arange(40) // 2)["interval"] == "alike"


# means over tags -------------------------------------------------------------------------------------


def test_the_mean_over_tags_counts_each_tag_once() -> None:
    values = np.concatenate([np.full(30, 0.2), np.full(10, 0.8)])
    tags = ["many"] * 30 + ["few"] * 10
    assert mean_of_strata(values, np.arange(40), tags).value == pytest.approx(0.5)
    assert summary(values, np.arange(40), tags)["mean"] == pytest.approx(0.35)


def test_of_equal_tags_both_means_and_both_intervals_agree() -> None:
    values, clusters, tags = images(11, strata=5)
    mean, low, high = mean_of_strata(values, clusters, tags)[:3]
    assert mean == pytest.approx(values.mean()) and (low, high) == pytest.approx(interval(values, clusters, tags), abs=1e-12)


def test_its_interval_is_that_of_independent_tags() -> None:
    """Var(mean over tags) = sum of the tags' variances / S^2, here with 200 and 20 prompts."""
    rng = np.random.default_rng(12)
    values, tags = rng.normal(size=220), np.array([0] * 200 + [1] * 20)
    error = math.sqrt(values[:200].var(ddof=1) / 200 + values[200:].var(ddof=1) / 20) / 2
    _, low, high = mean_of_strata(values, np.arange(220), tags, resamples=20_000)[:3]
    assert (high - low) / 2 == pytest.approx(1.959964 * error, rel=0.04)


# summaries -------------------------------------------------------------------------------------------


def test_a_summary_has_every_tag_in_order_of_appearance() -> None:
    values, clusters, numbers = images(13, strata=3)
    tags = np.array(["two", "color attribution", "counting"])[numbers]
    values[:2] = NAN
    found = summary(values, clusters, tags)
    assert list(found["by_tag"]) == ["two", "color attribution", "counting"]
    assert found["images"] == 480 and found["missing"] == 2 == sum(tag["missing"] for tag in found["by_tag"].values())
    assert sum(tag["images"] for tag in found["by_tag"].values()) == 480
    for tag, one in found["by_tag"].items():
        assert one["mean"] == pytest.approx(np.nanmean(values[tags == tag])) and one["low"] < one["mean"] < one["high"]
    assert found["mean_of_tags"]["mean"] == pytest.approx(np.mean([one["mean"] for one in found["by_tag"].values()]))
    assert (found["low"], found["high"]) == interval(values, clusters, tags)


def test_one_tag_or_none_has_no_means_by_tag() -> None:
    values, clusters, _ = images(14)
    for strata in (None, [""] * len(values), ["counting"] * len(values)):
        assert set(summary(values, clusters, strata)) == {"mean", "low", "high", "images", "missing", "prompts"}


def test_prompts_without_a_tag_count_in_the_mean_but_are_no_tag() -> None:
    values, clusters, numbers = images(15, strata=3)
    found = summary(values, clusters, np.array(["", "a", "b"])[numbers])
    assert list(found["by_tag"]) == ["a", "b"] and found["mean"] == pytest.approx(values.mean())
    assert found["mean_of_tags"]["mean"] == pytest.approx((values[numbers == 1].mean() + values[numbers == 2].mean()) / 2)


def test_a_tag_without_any_score_is_listed_as_missing() -> None:
    values, clusters, tags = images(16, strata=3)
    values[tags == 1] = NAN
    one = summary(values, clusters, tags)["by_tag"]["1"]
    assert one == {"mean": None, "low": None, "high": None, "images": 160, "missing": 160, "prompts": 0}


def test_a_tag_of_one_prompt_has_a_mean_and_no_interval() -> None:
    values, clusters, tags = images(17, strata=2)
    tags[clusters == 0] = 2
    one = summary(values, clusters, tags)["by_tag"]["2"]
    assert one["mean"] == pytest.approx(values[clusters == 0].mean()) and one["low"] is None is one["high"]


@pytest.mark.parametrize("values", [[NAN] * 6, [NAN, 0.5, NAN, NAN, NAN, NAN], [0.5] * 6])
def test_a_summary_is_json_whatever_is_missing(values: list[float]) -> None:
    clusters, tags = [0, 0, 1, 2, 3, 3], ["a", "a", "a", "b", "b", "b"]
    for found in (summary(values, clusters, tags), paired(values, values[::-1], clusters, tags)):
        assert json.loads(json.dumps(found, allow_nan=False)) == found


# pairs -----------------------------------------------------------------------------------------------


def test_a_paired_interval_is_much_narrower_where_pairs_are_alike() -> None:
    base, clusters, tags = images(18, strata=2)
    tuned = base + 0.1 + 0.1 * np.random.default_rng(0).normal(size=len(base))
    found = paired(tuned, base, clusters, tags)
    low, high = interval(tuned, clusters, tags)
    assert found["mean"] == pytest.approx((tuned - base).mean()) and found["low"] < 0.1 < found["high"] and found["low"] > 0
    assert found["high"] - found["low"] < 0.2 * (high - low)


def test_a_pair_is_minus_the_pair_the_other_way_round() -> None:
    base, clusters, tags = images(19, strata=2)
    tuned = base + np.random.default_rng(0).normal(size=len(base))
    tuned[:20] = base[:20]
    there, back = paired(tuned, base, clusters, tags), paired(base, tuned, clusters, tags)
    assert (there["mean"], there["low"], there["high"]) == pytest.approx((-back["mean"], -back["high"], -back["low"]), abs=1e-12)
    assert there["ties"] == back["ties"] == 20 / 320 and there["wins"] + back["wins"] + there["ties"] == pytest.approx(1.0)


def test_only_images_with_both_scores_are_compared() -> None:
    tuned = [1.0, NAN, 3.0, 4.0, NAN, 2.0]
    base = [0.0, 5.0, NAN, 4.0, NAN, 3.0]
    found = paired(tuned, base, [0, 0, 1, 1, 2, 2], [""] * 6)
    assert (found["images"], found["missing"], found["mean"]) == (6, 3, pytest.approx(0.0))
    assert (found["wins"], found["ties"]) == (pytest.approx(1 / 3), pytest.approx(1 / 3))


def test_pairs_of_another_length_or_infinite_scores_are_refused() -> None:
    with pytest.raises(ValueError, match="tuned and base"):
        paired([1.0, 2.0], [1.0], [0, 1])
    with pytest.raises(ValueError, match="finite"):
        paired([math.inf, 2.0], [math.inf, 1.0], [0, 1])


def test_no_torch_is_needed() -> None:
    code = "import sys, flowtilt.statistics; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
