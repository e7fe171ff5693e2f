"""Advantages compare the images of one prompt, and nothing else decides."""

import warnings
from itertools import combinations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from flowtilt.advantages import combine, group_advantages, group_means, group_stds, widest

FEW = settings(deadline=None, max_examples=25)
SCALES = ("global", "group")
EPS = 1e-4


def rollout(seed: int, prompts: int = 5, images: int = 4) -> tuple[Tensor, Tensor]:
    """Rewards and groups of a rollout in which the groups' images are mixed."""
    rng = torch.Generator().manual_seed(seed)
    groups = torch.arange(prompts).repeat_interleave(images)[torch.randperm(prompts * images, generator=rng)]
    return torch.rand(prompts * images, generator=rng), 7 * groups - 3


@FEW
@given(seed=st.integers(0, 999), scale=st.sampled_from(SCALES))
def test_the_advantages_of_a_group_add_up_to_zero(seed, scale):
    rewards, groups = rollout(seed)
    found = group_advantages(rewards, groups, scale)
    assert found.dtype == torch.float32
    for group in groups.unique():
        assert float(found[groups == group].sum()) == pytest.approx(0, abs=1e-5)


@FEW
@given(seed=st.integers(0, 999), shift=st.lists(st.floats(-3, 3), min_size=5, max_size=5))
def test_a_reward_that_is_easier_for_a_prompt_gives_no_advantage_within_the_group_scale(seed, shift):
    rewards, groups = rollout(seed)
    shifted = rewards.double() + torch.tensor(shift, dtype=torch.float64)[groups.unique(return_inverse=True)[1]]
    torch.testing.assert_close(group_advantages(shifted, groups, "group"), group_advantages(rewards, groups, "group"), rtol=1e-5, atol=1e-6)


@FEW
@given(seed=st.integers(0, 999), shift=st.floats(-3, 3))
def test_a_common_shift_changes_nothing_and_a_shift_per_group_only_the_common_scale(seed, shift):
    rewards, groups = rollout(seed)
    before = group_advantages(rewards, groups)
    torch.testing.assert_close(group_advantages(rewards.double() + shift, groups), before, rtol=1e-5, atol=1e-6)
    moved = rewards.double() + shift * (groups == groups[0])
    ratio = (rewards.double().std(correction=0) + EPS) / (moved.std(correction=0) + EPS)
    torch.testing.assert_close(group_advantages(moved, groups), (before * ratio).float(), rtol=1e-4, atol=1e-5)


def test_the_global_scale_divides_by_the_std_of_all_rewards_around_their_common_mean():
    """Rewards 0, 2 | 4, 4: common mean 2.5, variance (6.25 + .25 + 2.25 + 2.25) / 4 = 2.75."""
    found = group_advantages(torch.tensor([0.0, 2.0, 4.0, 4.0]), torch.tensor([0, 0, 1, 1]))
    one = 1 / (2.75**0.5 + EPS)
    assert found.tolist() == pytest.approx([-one, one, 0, 0], rel=1e-6)


def test_the_group_scale_divides_by_the_std_of_the_group():
    """Rewards 0, 2 have std 1, and 0, 6 have std 3: both pairs end at -1, 1."""
    found = group_advantages(torch.tensor([0.0, 0.0, 2.0, 6.0]), torch.tensor([0, 1, 0, 1]), "group")
    assert found.tolist() == pytest.approx([-1 / (1 + EPS), -3 / (3 + EPS), 1 / (1 + EPS), 3 / (3 + EPS)], rel=1e-6)


@FEW
@given(seed=st.integers(0, 999), factor=st.floats(0.1, 1000))
def test_without_a_scale_advantages_keep_the_rewards_unit_and_sum_to_zero_in_each_group(seed, factor):
    rewards, groups = rollout(seed)
    found = group_advantages(rewards.double() * factor, groups, "none")
    torch.testing.assert_close(found.double(), factor * (rewards.double() - group_means(rewards.double(), groups)), rtol=1e-5, atol=1e-5)
    assert group_means(found, groups).abs().max() < 1e-5 * factor
    assert group_advantages(torch.tensor([0.0, 2.0, 5.0, 5.0]), torch.tensor([0, 0, 1, 1]), "none").tolist() == [-1, 1, 0, 0]


@pytest.mark.parametrize("scale", SCALES)
def test_eps_is_added_to_the_std(scale):
    found = group_advantages(torch.tensor([0.0, 2.0]), torch.tensor([0, 0]), scale, eps=0.25)
    assert found.tolist() == pytest.approx([-1 / 1.25, 1 / 1.25])


@FEW
@given(seed=st.integers(0, 999), factor=st.floats(0.1, 1000), scale=st.sampled_from(SCALES))
def test_advantages_do_not_depend_on_the_unit_of_the_reward(seed, factor, scale):
    rewards, groups = rollout(seed)
    before = group_advantages(rewards, groups, scale, eps=0)
    torch.testing.assert_close(group_advantages(rewards.double() * factor, groups, scale, eps=0), before, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("scale", SCALES)
def test_advantages_follow_their_images_when_the_rollout_is_reordered(scale):
    rewards, groups = rollout(3)
    order = torch.randperm(len(rewards), generator=torch.Generator().manual_seed(4))
    torch.testing.assert_close(group_advantages(rewards, groups, scale)[order], group_advantages(rewards[order], groups[order], scale))


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("value", [0.1 + 0.2, 0.1, 1 / 3, 1e6 / 3, -1e9 / 7, 1e-9, 0.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("images", [3, 7])
def test_a_group_without_variance_has_advantages_of_exactly_zero(scale, value, dtype, images):
    groups = torch.arange(2 * images) // images
    rewards = torch.full((2 * images,), value, dtype=dtype)
    assert (group_advantages(rewards, groups, scale) == 0).all()
    rewards[images:] += (1 + abs(value)) * torch.arange(images)  # nor does a neighbour with variance change it
    found = group_advantages(rewards, groups, scale)
    assert (found[:images] == 0).all() and found[-1] > 0


@pytest.mark.parametrize("scale", SCALES)
def test_rewards_that_are_equal_but_for_their_last_bit_have_no_variance(scale):
    rewards = torch.tensor([0.1 + 0.2, 0.3, 0.3], dtype=torch.float64)
    assert rewards[0] != rewards[1]
    assert (group_advantages(rewards, torch.zeros(3, dtype=torch.long), scale) == 0).all()
    parts = torch.tensor([0.1, 0.1]) + torch.tensor([0.2, 0.2])
    assert (group_advantages(torch.cat([parts, torch.tensor([0.3])]), torch.zeros(3, dtype=torch.long), scale) == 0).all()


@pytest.mark.parametrize("scale", SCALES)
def test_a_group_of_one_image_has_no_advantage(scale):
    assert group_advantages(torch.tensor([0.3, 0.5, 0.9]), torch.tensor([0, 1, 2]), scale).tolist() == [0, 0, 0]


@pytest.mark.parametrize(
    ("rewards", "groups", "message"),
    [
        (torch.zeros(3), torch.zeros(2, dtype=torch.long), r"both be \[N\]"),
        (torch.zeros(2, 1), torch.zeros(2, 1, dtype=torch.long), r"both be \[N\]"),
        (torch.tensor([0.0, float("inf")]), torch.zeros(2, dtype=torch.long), "finite"),
    ],
)
def test_rewards_that_cannot_be_compared_are_refused(rewards, groups, message):
    with pytest.raises(ValueError, match=message):
        group_advantages(rewards, groups)


def test_an_unknown_scale_is_refused():
    with pytest.raises(ValueError, match="'batch' is not 'global', 'group' or 'none'"):
        group_advantages(torch.zeros(2), torch.zeros(2, dtype=torch.long), "batch")


def test_means_and_stds_of_groups_are_spread_back_to_their_images():
    values, groups = torch.tensor([1.0, 5.0, 3.0, 9.0]), torch.tensor([4, -1, 4, -1])
    assert group_means(values, groups).tolist() == [2, 7, 2, 7]
    assert group_stds(values, groups).tolist() == [1, 2, 1, 2]


# several rewards -------------------------------------------------------------------------------------

NAN = float("nan")
SCORES = {"a": torch.tensor([0.0, 1.0, 2.0, 3.0]), "b": torch.tensor([10.0, 30.0, 20.0, 0.0])}


def test_the_sum_is_of_raw_scores_with_their_weights():
    assert combine(SCORES, {"a": 1.0, "b": -0.5}).tolist() == [-5, -14, -8, 3]


@FEW
@given(seed=st.integers(0, 99), factor=st.floats(0.01, 1000), shift=st.floats(-10, 10))
def test_normalised_rewards_do_not_depend_on_their_unit_or_origin(seed, factor, shift):
    rng = torch.Generator().manual_seed(seed)
    a, b = torch.rand(2, 12, generator=rng, dtype=torch.float64)
    weights = {"a": 1.0, "b": 0.5}
    before = combine({"a": a, "b": b}, weights, "normalized")
    torch.testing.assert_close(combine({"a": a, "b": b * factor + shift}, weights, "normalized"), before, rtol=1e-4, atol=1e-4)


def test_each_normalised_reward_has_mean_0_and_std_1_before_its_weight():
    found = combine(SCORES, {"b": 2.0}, "normalized").double()
    assert float(found.mean()) == pytest.approx(0, abs=1e-6)
    assert float(found.std(correction=0)) == pytest.approx(2, rel=1e-6)


def test_a_reward_that_does_not_apply_adds_nothing():
    scores = {"a": torch.tensor([1.0, NAN, 3.0]), "b": torch.tensor([10.0, 20.0, NAN])}
    assert combine(scores, {"a": 1.0, "b": 0.5}).tolist() == [6, 10, 3]
    # normalised over the images it applies to: a is -1, 1 on two images, b is -1, 1
    assert combine(scores, {"a": 1.0, "b": 0.5}, "normalized").tolist() == pytest.approx([-1.5, 0.5, 1.0])


def test_a_constant_reward_normalises_to_zero_and_one_that_never_applies_to_nothing():
    scores = {"a": torch.full((3,), 0.1), "b": torch.full((3,), NAN), "c": torch.tensor([0.0, 1.0, 2.0])}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = combine(scores, {"a": 1.0, "b": 1.0, "c": 1.0}, "normalized")
    assert found.tolist() == pytest.approx([-(1.5**0.5), 0, 1.5**0.5])


@pytest.mark.parametrize("how", ["sum", "normalized"])
def test_a_reward_of_weight_0_is_only_watched(how):
    watched = torch.tensor([NAN, float("inf"), 5.0, 7.0])
    assert torch.equal(combine({**SCORES, "w": watched}, {"a": 1.0, "b": 0.5, "w": 0.0}, how), combine(SCORES, {"a": 1.0, "b": 0.5}, how))


def test_the_combined_reward_is_fp32_whatever_the_scores_are():
    assert combine({"a": torch.tensor([1.0], dtype=torch.float64)}, {"a": 1.0}).dtype == torch.float32
    assert combine({"a": torch.tensor([1, 2])}, {"a": 1.0}).tolist() == [1, 2]


@pytest.mark.parametrize("how", ["sum", "normalized"])
def test_what_cannot_be_combined_is_refused(how):
    with pytest.raises(ValueError, match="no reward has a weight"):
        combine(SCORES, {"a": 0.0, "b": 0.0}, how)
    with pytest.raises(ValueError, match="no reward gives any image a score"):
        combine(
            {"a": torch.tensor([NAN, NAN]), "b": torch.tensor([NAN, NAN]), "w": torch.tensor([1.0, 1.0])}, {"a": 1, "b": 1, "w": 0}, how
        )
    with pytest.raises(ValueError, match="reward b is infinite for image 1"):
        combine({"a": torch.tensor([1.0, 2.0]), "b": torch.tensor([0.0, -float("inf")])}, {"a": 1.0, "b": 1.0}, how)


def test_an_unknown_way_to_combine_is_refused():
    with pytest.raises(ValueError, match="'normalised' is not 'sum', 'normalized', 'group' or 'marble'"):
        combine(SCORES, {"a": 1.0}, "normalised")


# missing values ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("scale", ["global", "group"])
def test_a_missing_reward_changes_nothing_for_the_others_of_its_group(scale):
    rewards, groups = torch.tensor([1.0, 2.0, 4.0, 0.0, 3.0]), torch.tensor([0, 0, 0, 1, 1])
    with_gap = torch.tensor([1.0, 2.0, NAN, 4.0, 0.0, 3.0, NAN])
    found = group_advantages(with_gap, torch.tensor([0, 0, 0, 0, 1, 1, 1]), scale)
    assert found.isnan().tolist() == [False, False, True, False, False, False, True]
    assert torch.equal(found[~found.isnan()], group_advantages(rewards, groups, scale))


def test_a_group_with_one_known_reward_has_nothing_to_compare():
    assert group_advantages(torch.tensor([NAN, 5.0]), torch.tensor([0, 0])).nan_to_num(7.0).tolist() == [7.0, 0.0]


@pytest.mark.parametrize("how", ["sum", "normalized"])
def test_an_image_whose_judge_failed_has_no_total_instead_of_a_lower_one(how):
    groups = torch.tensor([0, 0, 0, 1, 1, 1])
    scores = {"a": torch.tensor([1.0, 2.0, 3.0, 1.0, 2.0, 3.0]), "b": torch.tensor([1.0, NAN, 2.0, NAN, NAN, NAN])}
    found = combine(scores, {"a": 1.0, "b": 1.0}, how, groups)
    assert found.isnan().tolist() == [False, True, False, False, False, False]
    # b does not apply to the second prompt: there a alone orders the images, as it would without b
    alone = combine({"a": scores["a"]}, {"a": 1.0}, how, groups)
    torch.testing.assert_close(found[3:], alone[3:])


def test_a_prompt_that_no_reward_judges_has_no_totals():
    found = combine({"a": torch.tensor([1.0, 2.0, NAN, NAN])}, {"a": 1.0}, "sum", torch.tensor([0, 0, 1, 1]))
    assert found[:2].tolist() == [1, 2] and found[2:].isnan().all()
    assert group_advantages(found, torch.tensor([0, 0, 1, 1])).isnan().tolist() == [False, False, True, True]


# GDPO and the images that differ most ---------------------------------------------------------------------


def test_gdpo_normalises_each_reward_within_its_group_whatever_its_unit():
    rng = torch.Generator().manual_seed(0)
    a, b = torch.rand(2, 12, generator=rng)
    groups = torch.arange(3).repeat_interleave(4)
    weights = {"a": 1.0, "b": 0.5}
    found = combine({"a": a, "b": b}, weights, "group", groups)
    torch.testing.assert_close(combine({"a": 7 * a - 3, "b": 0.01 * b + 5}, weights, "group", groups), found, rtol=1e-4, atol=1e-4)
    one = combine({"a": a}, {"a": 2.0}, "group", groups).view(3, 4)
    torch.testing.assert_close(one.mean(1), torch.zeros(3), atol=1e-6, rtol=0)
    torch.testing.assert_close(one.std(1, correction=0), torch.full((3,), 2.0), atol=1e-5, rtol=0)


def test_gdpo_gives_a_flat_group_nothing_and_a_reward_that_misses_a_group_adds_nothing():
    groups = torch.tensor([0, 0, 1, 1])
    nan = float("nan")
    found = combine({"a": torch.tensor([0.5, 0.5, 0.0, 1.0]), "b": torch.tensor([nan, nan, 3.0, 1.0])}, {"a": 1, "b": 1}, "group", groups)
    torch.testing.assert_close(found, torch.tensor([0.0, 0.0, 0.0, 0.0]), atol=1e-5, rtol=0)
    assert combine({"a": torch.tensor([0.0, 1.0, nan, 2.0])}, {"a": 1.0}, "group", groups).isnan().tolist() == [False, False, True, False]


@FEW
@given(st.lists(st.floats(-3, 3), min_size=2, max_size=9), st.integers(1, 9))
def test_the_kept_images_have_the_greatest_variance_of_all_choices(values, keep):
    rewards = torch.tensor(values, dtype=torch.float64)
    kept = widest(rewards, torch.zeros(len(values), dtype=torch.long), keep)
    assert int(kept.sum()) == min(keep, len(values))
    best = max(float(rewards[list(c)].var(correction=0)) for c in combinations(range(len(values)), min(keep, len(values))))
    assert float(rewards[kept].var(correction=0)) == pytest.approx(best, abs=1e-9)


def test_an_image_without_a_reward_is_never_kept():
    kept = widest(torch.tensor([float("nan"), 1.0, 2.0, 0.0]), torch.tensor([0, 0, 1, 1]), 2)
    assert kept.tolist() == [False, True, True, True]
