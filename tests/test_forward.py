"""What the forward-process objectives share: the hinge on the velocity's norm, the pull, the roles that are asked, and a run of each."""

import math
from dataclasses import replace

import pytest
import torch
from conftest import QUICK, quick
from forward_cases import N, along, draw, gradient, policy_and_batch, slopes
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import Tensor

from flowtilt import Trainer
from flowtilt.build import build_objective
from flowtilt.config import load_recipe
from flowtilt.errors import UserError
from flowtilt.flow import add_noise, predict_x0
from flowtilt.io.files import read_lines
from flowtilt.methods import built_in
from flowtilt.methods.forward import ForwardSettings
from flowtilt.methods.groups import GroupSettings
from flowtilt.objectives.batches import TrainingBatch
from flowtilt.objectives.forward import norm_hinge, norm_ratio, velocity_kl, x0_error
from flowtilt.objectives.nft import NFT
from flowtilt.plan.passes import passes_of

FEW = settings(deadline=None, max_examples=25)
STEPS = "rollout.steps=9"
FORWARD = [kind for kind, method in built_in().items() if issubclass(method, ForwardSettings) and not issubclass(method, GroupSettings)]


def rows_of(batch: TrainingBatch) -> list[TrainingBatch]:
    rows = torch.arange(N).split(1)
    return [TrainingBatch(batch.x0[k], batch.eps[k], batch.t[k], batch.advantages[k], batch.conditioning.select(k)) for k in rows]


def rms(v: Tensor) -> Tensor:
    return v.square().mean((1, 2, 3)).sqrt()


def method(kind: str, *overrides: str):
    return build_objective(load_recipe("playground", [f"objective.type={kind}", STEPS, *overrides]).objective)


# the error --------------------------------------------------------------------------------------------


def test_the_error_is_that_of_the_predicted_data_over_its_own_size():
    case = draw()
    x_t = add_noise(case.x0, case.eps, case.t)
    off = predict_x0(x_t, case.v, case.t) - case.x0
    torch.testing.assert_close(x0_error(case.v, case.v_target, case.t), off.square().mean((1, 2, 3)) / off.abs().mean((1, 2, 3)))


# the hinge --------------------------------------------------------------------------------------------


@FEW
@given(seed=st.integers(0, 99), share=st.floats(0, 1), radius=st.floats(0.5, 2))
def test_the_hinge_and_its_gradient_are_zero_inside_the_radius(seed, share, radius):
    case = draw(seed)
    inside = share * radius * 0.999 * case.v * (rms(case.v_old) / rms(case.v)).view(-1, 1, 1, 1)
    assert (norm_hinge(inside, case.v_old, radius) == 0).all()
    assert (gradient(lambda v: norm_hinge(v, case.v_old, radius), inside) == 0).all()


@FEW
@given(seed=st.integers(0, 99), beyond=st.floats(1.01, 5), radius=st.floats(0.5, 2))
def test_outside_it_is_the_mean_square_distance_to_the_ball_and_pulls_straight_back(seed, beyond, radius):
    case = draw(seed)
    nearest = radius * case.v * (rms(case.v_old) / rms(case.v)).view(-1, 1, 1, 1)
    outside = beyond * nearest
    torch.testing.assert_close(norm_hinge(outside, case.v_old, radius), velocity_kl(outside, nearest))
    found = gradient(lambda v: norm_hinge(v, case.v_old, radius), outside)
    torch.testing.assert_close(found, gradient(lambda v: velocity_kl(v, nearest), outside), rtol=1e-6, atol=1e-9)


def test_the_hinges_gradient_is_its_finite_difference():
    case, direction = draw(), draw(1).v
    long = 1.5 * case.v
    found = gradient(lambda v: norm_hinge(v, case.v), long)
    torch.testing.assert_close(along(found, direction), slopes(lambda v: norm_hinge(v, case.v), long, direction), rtol=1e-6, atol=1e-9)


def test_a_velocity_of_zero_has_a_finite_gradient_even_beside_a_reference_of_zero():
    nothing = torch.zeros(2, 3, 4, 4)
    for reference in (nothing, torch.ones_like(nothing)):
        assert (gradient(lambda v, reference=reference: norm_hinge(v, reference), nothing) == 0).all()


def test_the_reference_gets_no_gradient_and_the_ratio_is_that_of_the_lengths():
    case = draw()
    v, ref = (2 * case.v).requires_grad_(), case.v.clone().requires_grad_()
    norm_hinge(v, ref).sum().backward()
    assert ref.grad is None and v.grad is not None
    torch.testing.assert_close(norm_ratio(2 * case.v, case.v), torch.full((N,), 2.0, dtype=torch.float64))


# every method -----------------------------------------------------------------------------------------


# RAM has its pull to the reference in the target, and no weight for it
@pytest.mark.parametrize("guard", [0.0, 0.7])
@pytest.mark.parametrize(("kind", "kl"), [(kind, kl) for kind in FORWARD for kl in (0.0, 0.1) if not (kind == "ram" and kl)])
def test_a_method_returns_the_metrics_that_it_names_and_asks_no_role_for_nothing(kind, kl, guard):
    objective = method(kind, f"objective.norm_guard={guard}", *([] if kind == "ram" else [f"objective.kl={kl}"]))
    policy, batch = policy_and_batch(current=0.5, old=0.2, reference=-0.1)
    loss, metrics = objective.loss(policy, batch)
    assert list(metrics) == list(objective.metrics)
    assert loss.shape == (N,) and loss.requires_grad and loss.isfinite().all()
    assert all(value.shape == (N,) and not value.requires_grad for value in metrics.values())
    torch.testing.assert_close(metrics["loss"], loss.detach())
    assert policy.asked == ["current", "old", "reference"][: 2 + (kind == "ram" or bool(kl or guard))]


@pytest.mark.parametrize("kind", ["nft", "awr", "epg", "pepg", "par", "awm"])
def test_equal_images_that_share_noise_and_level_have_no_gradient_where_the_policies_agree_and_advantages_sum_to_zero(kind):
    policy, batch = policy_and_batch(current=0.5, old=0.5)
    first = torch.tensor([0, 0, 2, 2])  # two groups of two

    def slope(eps: Tensor) -> Tensor:
        a = torch.tensor([0.9, -0.9, 0.4, -0.4], dtype=torch.float64)
        alike = replace(batch, x0=batch.x0[first], eps=eps, t=batch.t[first], advantages=a)
        loss, _ = method(kind, "objective.kl=0", "objective.consistency=0").loss(policy, alike)
        return torch.autograd.grad(loss.sum(), policy.weights["current"])[0].abs()

    assert slope(batch.eps[first]) < 1e-12 and slope(batch.eps) > 1e-3


@pytest.mark.parametrize("kind", FORWARD)
def test_pull_and_hinge_are_added_with_their_weights(kind):
    policy, batch = policy_and_batch(current=0.9, old=0.2, reference=0.3)
    x_t = add_noise(batch.x0, batch.eps, batch.t)
    v, v_ref = (policy.velocity(role, x_t, batch.t, batch.conditioning) for role in ("current", "reference"))
    weights = {"norm_guard": 0.7} if kind == "ram" else {"norm_guard": 0.7, "kl": 0.25}
    with_both = method(kind, *(f"objective.{name}={value}" for name, value in weights.items())).loss(policy, batch)[0]
    without = method(kind, *(f"objective.{name}=0" for name in weights)).loss(policy, batch)[0]
    hinge = norm_hinge(v, v_ref)
    assert (hinge > 0).all()
    torch.testing.assert_close(with_both - without, weights.get("kl", 0.0) * velocity_kl(v, v_ref) + 0.7 * hinge)


@pytest.mark.parametrize("kind", FORWARD)
def test_equal_policies_cost_one_forward_less(kind):
    policy, batch = policy_and_batch(current=0.5, old=0.5, reference=-0.1)
    objective = method(kind, *([] if kind == "ram" else ["objective.kl=0"]))
    loss, _ = objective.loss(policy, batch)
    assert policy.asked == (["current", "reference"] if kind == "ram" else ["current"])
    apart, _ = policy_and_batch(current=0.5, old=0.5 + 1e-12, reference=-0.1)
    torch.testing.assert_close(objective.loss(apart, batch)[0], loss)


@pytest.mark.parametrize("kind", FORWARD)
def test_samples_do_not_see_each_other(kind):
    policy, batch = policy_and_batch(current=0.5, old=0.2, reference=-0.1)
    objective = method(kind, "objective.norm_guard=0.5")
    together = objective.loss(policy, batch)[0]
    alone = torch.cat([objective.loss(policy, row)[0] for row in rows_of(batch)])
    torch.testing.assert_close(alone, together, rtol=1e-12, atol=0)


@pytest.mark.parametrize(("kind", "decay"), [("nft", 0.4), ("awm", 0.3), ("epg", 0.4), ("pepg", 0.4), ("par", 0.4), ("ram", 0.0)])
def test_after_a_rollout_the_old_policy_moves_by_the_methods_schedule(kind, decay):
    policy, _ = policy_and_batch(current=0.5)
    method(kind).after_rollout(policy, 400)
    assert policy.averaged == [("old", pytest.approx(decay))]


@pytest.mark.parametrize("kind", FORWARD)
def test_each_playground_recipe_trains(kind, tmp_path):
    name = "playground" if kind == "nft" else f"playground-{kind}"
    tiny = ["rollouts=3", "rollout.prompts=2", "evaluate.every=0", "evaluate.images=1", "evaluate.steps=1", "evaluate.samples=0"]
    Trainer(load_recipe(name, [*QUICK, *tiny, "objective.norm_guard=0.1", f"run={tmp_path / 'run'}"])).run()
    records = read_lines(tmp_path / "run" / "metrics.jsonl")
    assert all(math.isfinite(record[key]) for record in records for key in ("loss", "grad_norm", "kl", "norm_ratio"))
    assert all(record["grad_norm"] > 0 and record["skipped_updates"] == 0 for record in records)
    newest = sorted((tmp_path / "run" / "checkpoints").iterdir())[-1]
    current, old = (load_file(newest / f"{role}.safetensors") for role in ("current", "old"))
    moved = [name for name, value in current.items() if ".lora_B" in name and value.abs().max() > 0]  # they start at 0
    assert len(moved) >= len(current) // 2 - 1  # the last block throws one layer's output away
    # the old policy lags but for RAM, which draws from the trained one
    assert all(torch.equal(current[name], old[name]) for name in current) == (kind == "ram")
    assert not (tmp_path / "run" / "guards.jsonl").exists()


# the reference on a part of the rows


@pytest.mark.parametrize("rows", [(0,), (1, 3), (0, 1, 2, 3), ()])
def test_the_pull_of_some_rows_is_theirs_over_the_share_and_that_of_the_others_nothing(rows):
    policy, batch = policy_and_batch(current=0.7, old=0.7, reference=0.2)
    whole = NFT(kl=0.3, norm_guard=0.2)
    part = whole.model_copy(update={"reference_share": 0.25})
    none = whole.model_copy(update={"kl": 0.0, "norm_guard": 0.0})
    asked = torch.tensor([row in rows for row in range(len(batch))])
    own = none.loss(policy, batch)[0]
    loss, metrics = part.loss(policy, replace(batch, referenced=asked))
    everywhere, theirs = whole.loss(policy, batch)
    torch.testing.assert_close(loss - own, torch.where(asked, 4 * (everywhere - own), 0.0))
    for name in ("kl", "norm_ratio"):
        torch.testing.assert_close(metrics[name], torch.where(asked, 4 * theirs[name], 0.0))


def test_a_method_that_reads_the_reference_itself_asks_it_for_every_row():
    with pytest.raises(UserError, match="reference_share: ram compares every row with the reference"):
        load_recipe("playground-ram", ["objective.reference_share=0.5"])


def test_a_run_asks_the_reference_for_about_its_share_whatever_the_micro_batch(tmp_path):
    losses = []
    for size in ("5", "12"):
        recipe = quick(
            tmp_path / size, "objective.kl=0.1", "objective.reference_share=0.25", f"micro_batch={size}", "rollouts=1", "evaluate.every=0"
        )
        Trainer(recipe).run()
        (line,) = read_lines(tmp_path / size / "metrics.jsonl")
        losses.append(line["kl"])
        saved = passes_of(quick(tmp_path / "all", "objective.kl=0.1"), 1).evaluations - line["network_evaluations"]
        assert 12 <= saved <= 24  # of 24 rows, 18 in expectation
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
