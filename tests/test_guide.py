"""The guide's pull, shared noise, rows by advantage, kept images, schedules: what they compute, and that no batch changes it."""

import pytest
import torch
from conftest import quick
from forward_cases import policy_and_batch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from flowtilt import Trainer
from flowtilt.build import build_objective
from flowtilt.config import load_recipe
from flowtilt.errors import UserError
from flowtilt.flow import add_noise
from flowtilt.io.files import read_lines
from flowtilt.methods.schedule import value_at
from flowtilt.models.conditioning import Conditioning
from flowtilt.objectives.batches import Guide
from flowtilt.objectives.forward import velocity_kl
from flowtilt.training.rows import row_counts
from flowtilt.training.timing import Phases

FEW = settings(deadline=None, max_examples=25)


# schedules ----------------------------------------------------------------------------------------------


def test_a_schedule_is_level_outside_its_points_and_straight_between_them():
    points = ((10.0, 1.0), (20.0, 3.0), (40.0, 0.0))
    assert [value_at(points, x) for x in (0, 10, 15, 20, 30, 40, 99)] == [1, 1, 2, 3, 1.5, 0, 0]
    assert value_at(0.3, 12) == 0.3


@pytest.mark.parametrize("points", ["[]", "[[3,1],[2,1]]", "[[1]]", "[[0,-1]]", "x", "[[0,1],[0,2]]"])
def test_a_schedule_that_makes_no_sense_is_one_line(points):
    with pytest.raises(UserError, match=r"objective\.guide") as caught:
        load_recipe("playground", [f"objective.guide={points}"])
    assert "\n" not in str(caught.value)


def test_the_learning_rate_follows_its_schedule(tmp_path):
    recipe = quick(tmp_path / "run", "optimizer.schedule=[[0,1.0],[2,0.5],[4,0]]", "optimizer.half_life=1000000", "rollouts=2", whole=True)
    Trainer(recipe).run()
    rates = [line["lr"] / recipe.optimizer.lr for line in read_lines(tmp_path / "run" / "metrics.jsonl")]
    assert rates == pytest.approx([0.5, 0.0], abs=1e-4)  # that of the update to come, after two and four


# the pull -----------------------------------------------------------------------------------------------


def guided_batch(rows, least=0.0, weight=2.0, **weights):
    policy, batch = policy_and_batch(**weights)
    empty = Conditioning({"c": torch.zeros(1, 1)}, torch.zeros(1, dtype=torch.long))
    guide = Guide(torch.tensor(rows), weight, least)
    return policy, type(batch)(batch.x0, batch.eps, batch.t, batch.advantages, batch.conditioning, guide=guide, empty=empty)


@pytest.mark.parametrize("kind", ["nft", "awm", "awr"])
def test_the_guide_pulls_the_chosen_rows_to_the_guided_old_velocity(kind):
    rows = [True, False, True, True]
    policy, batch = guided_batch(rows, current=0.9, old=0.2, reference=0.3)
    objective = build_objective(load_recipe("playground", [f"objective.type={kind}", "objective.guide=1", "objective.guide_scale=3",
                                                           "objective.times=stratified", "objective.kl=0"]).objective)  # fmt: skip
    loss, metrics = objective.loss(policy, batch)
    plain, _ = objective.loss(policy, type(batch)(batch.x0, batch.eps, batch.t, batch.advantages, batch.conditioning))
    x_t = add_noise(batch.x0, batch.eps, batch.t)
    v, v_old, v_ref = (policy.velocity(role, x_t, batch.t, batch.conditioning) for role in ("current", "old", "reference"))
    expected = 2.0 * velocity_kl(v, v_old + 2 * (v_old - v_ref)) * torch.tensor(rows)
    torch.testing.assert_close(loss - plain, expected)
    torch.testing.assert_close(metrics["guide"], expected.detach())


def test_rows_below_the_least_level_carry_no_guide_and_cost_no_pass():
    policy, batch = guided_batch([True] * 4, least=2.0, current=0.9, old=0.2, reference=0.3)
    objective = build_objective(load_recipe("playground", ["objective.guide=1"]).objective)
    _, metrics = objective.loss(policy, batch)
    assert metrics["guide"].abs().max() == 0 and "reference" not in policy.asked


def run(folder, *overrides):
    Trainer(quick(folder, *overrides)).run()
    return load_file(folder / "checkpoints" / "step-000002" / "current.safetensors"), read_lines(folder / "metrics.jsonl")


@pytest.mark.parametrize(
    "options",
    [
        ["objective.guide=0.5", "objective.row_share=0.6", "objective.times_range=[0.3,0.9]"],
        ["objective.shared=both", "objective.reference_guidance=2.0", "objective.kl=0.1"],
    ],
)
def test_a_micro_batch_changes_no_result(tmp_path, options):
    large, lines = run(tmp_path / "large", *options, "micro_batch=64")
    small, others = run(tmp_path / "small", *options, "micro_batch=5")
    assert others[0]["grad_norm"] == pytest.approx(lines[0]["grad_norm"], rel=1e-4)
    assert others[0]["loss"] == pytest.approx(lines[0]["loss"], rel=1e-5)
    moved = [name for name in large if ".lora_B" in name]  # AdamW divides by the gradient's size, and rounding with it
    a, b = (torch.cat([weights[name].flatten() for name in moved]) for weights in (large, small))
    assert (a - b).norm() < 0.01 * a.norm()


def test_grpo_takes_the_guide_too_and_a_guided_rollout_does_not_go_with_it(tmp_path):
    options = ["objective.type=grpo", "objective.guide=[[0,0.5],[1,0]]", "objective.guide_share=1"]
    _, lines = run(tmp_path / "run", *options, "rollout.steps=4")
    assert lines[0]["guide"] > 0 and lines[1]["guide"] == 0
    with pytest.raises(UserError, match=r"objective\.guide: .*rollout\.guidance"):
        load_recipe("playground", ["objective.type=grpo", "objective.guide=0.5", "rollout.guidance=3"])


# shared noise and times -----------------------------------------------------------------------------------


@pytest.mark.parametrize("shared", ["none", "noise", "time", "both"])
def test_images_of_a_prompt_share_noise_and_times_as_asked_and_prompts_never_do(tmp_path, shared):
    trainer = Trainer(quick(tmp_path / "run", f"objective.shared={shared}"))
    drawn = trainer.walk.take(0, trainer.recipe.rollout.prompts)
    rollout, _ = trainer.method.rollouts.sample(1, drawn, Phases(torch.device("cpu")))
    rows = trainer.method.learner.rows(1, rollout, list(range(len(rollout.x0))))
    t, eps = rows.t.view(3, 4, 2), rows.eps.view(3, 4, 2, *rows.eps.shape[1:])
    assert (t[:, 0] == t[:, 1]).all() == (shared in ("time", "both"))
    assert (eps[:, 0] == eps[:, 1]).all() == (shared in ("noise", "both"))
    assert not torch.equal(eps[0], eps[1]) and not torch.equal(t[0], t[1])
    some = trainer.method.learner.rows(1, rollout, [5, 2])  # of an image's rows, whichever others there are
    assert torch.equal(some.t[:2], rows.t[10:12]) and torch.equal(some.eps[2:], rows.eps[4:6])


# rows by advantage ----------------------------------------------------------------------------------------


@FEW
@given(
    values=st.lists(st.floats(-5, 5), min_size=2, max_size=30), number=st.integers(1, 9), share=st.floats(0.2, 1), seed=st.integers(0, 99)
)
def test_rows_are_about_as_many_as_asked_and_each_image_is_within_one_of_its_expectation(values, number, share, seed):
    a = torch.tensor(values)
    counts, weights = row_counts(a, number, share, torch.Generator().manual_seed(seed))
    assert abs(int(counts.sum()) - share * number * len(a)) <= 1
    assert ((counts - number / weights).abs() < 1 + 1e-4).all()


def test_the_weighted_sum_over_rows_is_unbiased():
    a, value = torch.tensor([3.0, -1.0, 0.2, 0.0, -2.0]), torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0])
    sums = []
    for seed in range(2000):
        counts, weights = row_counts(a, 2, 0.6, torch.Generator().manual_seed(seed))
        sums.append(float((counts * weights * value).sum()))
    mean, error = torch.tensor(sums).mean(), torch.tensor(sums).std() / len(sums) ** 0.5
    assert abs(float(mean) - 2 * float(value.sum())) < 4 * float(error) + 1e-6


def test_an_image_without_a_reward_has_no_rows_and_flat_rewards_share_alike():
    counts, _ = row_counts(torch.tensor([1.0, float("nan"), -1.0]), 4, 0.5, torch.Generator().manual_seed(0))
    assert counts[1] == 0 and counts.sum() == 4
    counts, weights = row_counts(torch.zeros(4), 2, 0.5, torch.Generator().manual_seed(0))
    assert (counts == 1).all() and torch.equal(weights, torch.full((4,), 2.0))


def test_a_prompts_kept_images_have_the_advantages_of_its_whole_group(tmp_path):
    trainer = Trainer(quick(tmp_path / "run", "rollout.train_per_prompt=2", "advantage=group"))
    drawn = trainer.walk.take(0, trainer.recipe.rollout.prompts)
    rollout, _ = trainer.method.rollouts.sample(1, drawn, Phases(torch.device("cpu")))
    rewards, found, kept = (values.view(3, 4) for values in (rollout.rewards.double(), rollout.all_advantages, rollout.kept))

    def compared(of):
        return ((of - of.mean(1, keepdim=True)) / (of.std(1, correction=0, keepdim=True) + 1e-4)).float()

    assert (kept.sum(1) == 2).all()
    torch.testing.assert_close(found, compared(rewards))
    assert (found[kept].view(3, 2) - compared(rewards[kept].view(3, 2))).abs().min() > 0.01
    own = rollout.own(kept.flatten().nonzero()[:, 0].tolist())
    batch = next(trainer.method.learner.rows(1, rollout, own).micro_batches(64))
    assert torch.equal(batch.advantages.view(3, 2, 2), found[kept].view(3, 2, 1).expand(3, 2, 2))


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("objective.row_share=0.5", 'objective.row_share: needs times = "stratified"'),
        ("objective.times_range=[0.1,0.9]", 'objective.times_range: needs times = "stratified"'),
    ],
)
def test_keys_of_stratified_times_need_them(override, said):
    with pytest.raises(UserError, match=said):
        load_recipe("playground", ["objective.times=rollout", override])
