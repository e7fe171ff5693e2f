"""DiffusionNFT's loss is the paper's, its gradient is that of the loss with the weights held, and what follows from both.

The formula is written out once more here in the paper's form, with x_t and x0_hat (`written`); everything is in float64.
"""

import dataclasses
from functools import partial

import pytest
import torch
from forward_cases import Case, N, draw, policy_and_batch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from flowtilt.flow import add_noise, predict_x0, sigma_schedule
from flowtilt.models.levels import Levels
from flowtilt.objectives import ema_decay
from flowtilt.objectives.batches import draw_times
from flowtilt.objectives.nft import NFT, nft_loss, old_policy_decay, optimality, velocity_kl
from flowtilt.seeding import generator

FEW = settings(deadline=None, max_examples=25)


def weight_of(x0_hat: Tensor, x0: Tensor) -> Tensor:
    return (x0_hat - x0).abs().mean((1, 2, 3)).clamp_min(1e-5)


def halves(case: Case, v: Tensor, beta: float) -> tuple[Tensor, Tensor]:
    """x0_hat of the implicit positive and negative velocity."""
    x_t = add_noise(case.x0, case.eps, case.t)
    plus, minus = (1 - beta) * case.v_old + beta * v, (1 + beta) * case.v_old - beta * v
    return predict_x0(x_t, plus, case.t), predict_x0(x_t, minus, case.t)


def written(case: Case, v: Tensor, beta: float, clip: float = 5.0, weights: tuple[Tensor, Tensor] | None = None) -> Tensor:
    """a_max [r L+ + (1 - r) L-] / beta in the paper's x0 form, with its own weights or given ones."""
    plus, minus = halves(case, v, beta)
    w_plus, w_minus = weights or (weight_of(plus, case.x0), weight_of(minus, case.x0))
    l_plus = (plus - case.x0).square().mean((1, 2, 3)) / w_plus
    l_minus = (minus - case.x0).square().mean((1, 2, 3)) / w_minus
    return clip * (case.r * l_plus + (1 - case.r) * l_minus) / beta


def gradient(case: Case, v: Tensor, beta: float, clip: float = 5.0) -> Tensor:
    v = v.clone().requires_grad_()
    nft_loss(v, case.v_old, case.v_target, case.t, case.r, beta=beta, clip=clip).sum().backward()
    assert v.grad is not None
    return v.grad


def error_gradient(case: Case, v: Tensor) -> Tensor:
    """grad of mean (x0_hat - x0)^2 / sg(w) by hand: 2 t^2 (v - v_target) / (pixels w)."""
    t = case.t.view(-1, 1, 1, 1)
    w = weight_of(predict_x0(add_noise(case.x0, case.eps, case.t), v, case.t), case.x0)
    return 2 * t**2 * (v - case.v_target) / (v[0].numel() * w.view(-1, 1, 1, 1))


@FEW
@given(seed=st.integers(0, 999), beta=st.floats(0.05, 3), clip=st.floats(0.5, 10))
def test_the_loss_is_the_papers_formula_in_x0_form(seed, beta, clip):
    case = draw(seed)
    found = nft_loss(case.v, case.v_old, case.v_target, case.t, case.r, beta=beta, clip=clip)
    assert found.shape == (N,)
    torch.testing.assert_close(found, written(case, case.v, beta, clip), rtol=1e-6, atol=0)


@pytest.mark.parametrize("beta", [0.1, 1.0, 2.0])
@pytest.mark.parametrize("seed", range(3))
def test_the_gradient_is_the_finite_difference_of_the_formula_with_its_weights_held(seed, beta):
    case, h = draw(seed), 1e-5
    held = tuple(weight_of(x0_hat, case.x0) for x0_hat in halves(case, case.v, beta))
    found = gradient(case, case.v, beta)
    direction = torch.randn(*case.v.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    difference = (written(case, case.v + h * direction, beta, weights=held) - written(case, case.v - h * direction, beta, weights=held)) / (
        2 * h
    )
    torch.testing.assert_close((found * direction).sum((1, 2, 3)), difference, rtol=1e-5, atol=1e-7)


def test_each_entry_of_the_gradient_is_its_own_finite_difference():
    case, h = draw(5), 1e-5
    held = tuple(weight_of(x0_hat, case.x0) for x0_hat in halves(case, case.v, 0.5))
    found = gradient(case, case.v, 0.5)[0].flatten()
    for k in range(len(found)):
        nudge = torch.zeros_like(case.v)
        nudge[0].view(-1)[k] = h
        up, down = (written(case, v, 0.5, weights=held)[0] for v in (case.v + nudge, case.v - nudge))
        assert float(found[k]) == pytest.approx(float(up - down) / (2 * h), rel=1e-5, abs=1e-7)


@FEW
@given(seed=st.integers(0, 999), beta=st.floats(0.05, 3), clip=st.floats(0.5, 10), a=st.lists(st.floats(-20, 20), min_size=N, max_size=N))
def test_where_the_policies_agree_the_gradient_is_the_clipped_advantage_times_that_of_the_error_whatever_beta_is(seed, beta, clip, a):
    case = draw(seed)
    advantages = torch.tensor(a, dtype=torch.float64)
    case.v_old, case.r = case.v, optimality(advantages, clip)
    expected = advantages.clamp(-clip, clip).view(-1, 1, 1, 1) * error_gradient(case, case.v)
    torch.testing.assert_close(gradient(case, case.v, beta, clip), expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("beta", [0.1, 1.0])
def test_an_average_image_gives_no_gradient_where_the_policies_agree(beta):
    case = draw()
    case.v_old, case.r = case.v, torch.full((N,), 0.5, dtype=torch.float64)
    torch.testing.assert_close(gradient(case, case.v, beta), torch.zeros_like(case.v), rtol=0, atol=1e-12)


def test_a_good_image_pulls_the_velocity_to_its_target_and_a_bad_one_pushes_it_away():
    case = draw()
    case.v_old = case.v
    toward = case.v_target - case.v
    for r, sign in ((0.9, 1), (0.1, -1)):
        case.r = torch.full((N,), r, dtype=torch.float64)
        assert ((-gradient(case, case.v, 1.0) * toward).sum((1, 2, 3)).sign() == sign).all()


def test_all_good_and_beta_1_is_self_normalised_flow_matching():
    case = draw()
    case.r = torch.ones(N, dtype=torch.float64)
    x0_hat = predict_x0(add_noise(case.x0, case.eps, case.t), case.v, case.t)
    expected = (x0_hat - case.x0).square().mean((1, 2, 3)) / weight_of(x0_hat, case.x0)
    found = nft_loss(case.v, case.v_old, case.v_target, case.t, case.r, beta=1.0, clip=1.0)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=0)
    torch.testing.assert_close(gradient(case, case.v, 1.0, 1.0), error_gradient(case, case.v), rtol=1e-6, atol=1e-9)


@FEW
@given(seed=st.integers(0, 999), beta=st.floats(0.1, 2))
def test_good_and_bad_change_places_when_the_policy_is_mirrored_at_the_old_one(seed, beta):
    case = draw(seed)
    mirrored = 2 * case.v_old - case.v
    there = nft_loss(mirrored, case.v_old, case.v_target, case.t, 1 - case.r, beta=beta)
    torch.testing.assert_close(nft_loss(case.v, case.v_old, case.v_target, case.t, case.r, beta=beta), there)


def test_the_old_policy_never_gets_a_gradient():
    case = draw()
    case.v.requires_grad_(), case.v_old.requires_grad_()
    nft_loss(case.v, case.v_old, case.v_target, case.t, case.r, beta=0.7).sum().backward()
    assert case.v_old.grad is None and case.v.grad is not None


def test_samples_do_not_see_each_other():
    case = draw()
    together = nft_loss(case.v, case.v_old, case.v_target, case.t, case.r, beta=0.5)
    for i in range(N):
        row = slice(i, i + 1)
        alone = nft_loss(case.v[row], case.v_old[row], case.v_target[row], case.t[row], case.r[row], beta=0.5)
        torch.testing.assert_close(alone, together[row], rtol=1e-12, atol=0)


def test_one_time_for_all_samples_may_be_a_scalar():
    case = draw()
    arguments = (case.v, case.v_old, case.v_target)
    found = nft_loss(*arguments, 0.5, case.r, beta=0.5)
    assert torch.equal(found, nft_loss(*arguments, torch.full((N,), 0.5, dtype=torch.float64), case.r, beta=0.5))


def test_a_perfect_prediction_has_no_loss_and_a_finite_gradient():
    """The weight is never below 1e-5, so nothing divides by zero."""
    case = draw()
    case.v_old = case.v_target
    assert (nft_loss(case.v_target, case.v_target, case.v_target, case.t, case.r, beta=1.0) == 0).all()
    assert (gradient(case, case.v_target, 1.0) == 0).all()
    case.r = torch.ones(N, dtype=torch.float64)
    off = case.v_target + 1e-7
    expected = 5 * (case.t * 1e-7).square() / 1e-5
    found = nft_loss(off, case.v_target, case.v_target, case.t, case.r, beta=1.0)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=0)


def test_the_loss_in_fp32_is_that_in_float64():
    case = draw()
    exact = nft_loss(case.v, case.v_old, case.v_target, case.t, case.r, beta=0.1)
    single = (x.float() for x in (case.v, case.v_old, case.v_target, case.t, case.r))
    found = nft_loss(*single, beta=0.1)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), exact, rtol=1e-4, atol=0)


# what surrounds the loss -----------------------------------------------------------------------------


@FEW
@given(a=st.lists(st.floats(-1e6, 1e6), min_size=2, max_size=6), clip=st.floats(0.1, 100))
def test_optimality_is_a_probability_that_never_falls_with_the_advantage(a, clip):
    r = optimality(torch.tensor(sorted(a), dtype=torch.float64), clip)
    assert (r >= 0).all() and (r <= 1).all()
    assert (r.diff() >= 0).all()


def test_optimality_is_a_half_at_the_mean_and_ends_where_the_advantage_is_clipped():
    assert optimality(torch.tensor([-9.0, -5.0, -2.5, 0.0, 2.5, 5.0, 9.0])).tolist() == [0, 0, 0.25, 0.5, 0.75, 1, 1]
    assert optimality(torch.tensor([-1.0, 1.0]), clip=2.0).tolist() == [0.25, 0.75]


@pytest.mark.parametrize(
    ("schedule", "step", "decay"),
    [
        ("copy", 0, 0), ("copy", 10**6, 0),
        ("linear", 0, 0), ("linear", 1, 0.001), ("linear", 499, 0.499), ("linear", 500, 0.5), ("linear", 501, 0.5), ("linear", 10**6, 0.5),
        ("short", 0, 0), ("short", 299, 0.299), ("short", 301, 0.3), ("short", 10**6, 0.3),
        ("delayed", 0, 0), ("delayed", 74, 0), ("delayed", 75, 0), ("delayed", 76, 0.0075),
        ("delayed", 208, 0.9975), ("delayed", 209, 0.999), ("delayed", 10**6, 0.999),
    ],
)  # fmt: skip
def test_the_old_policys_decay_follows_its_schedule_to_the_corners(schedule, step, decay):
    assert old_policy_decay(schedule, step) == pytest.approx(decay, abs=1e-15)


def test_an_unknown_schedule_is_refused_by_name():
    with pytest.raises(ValueError, match="'cosine' is not one of copy, linear, short, delayed"):
        old_policy_decay("cosine", 3)


def test_the_averages_decay_warms_up_to_its_maximum():
    assert [ema_decay(s) for s in (0, 1, 8)] == pytest.approx([1 / 10, 2 / 11, 9 / 18])
    assert ema_decay(79) < 0.9 and ema_decay(80) == pytest.approx(0.9) and ema_decay(10**6) == 0.9
    assert ema_decay(10**6, 0.5) == 0.5 and ema_decay(3, 0.0) == 0
    assert all(ema_decay(s) <= ema_decay(s + 1) for s in range(200))


def test_the_pull_to_the_reference_is_the_mean_square_and_moves_only_the_policy():
    case = draw()
    case.v.requires_grad_(), case.v_old.requires_grad_()
    pull = velocity_kl(case.v, case.v_old)
    torch.testing.assert_close(pull, (case.v - case.v_old).square().mean((1, 2, 3)))
    pull.sum().backward()
    assert case.v_old.grad is None
    torch.testing.assert_close(case.v.grad, 2 * (case.v - case.v_old).detach() / case.v[0].numel())


def test_the_objective_is_the_loss_at_x_t_and_the_weighted_pull_to_the_reference():
    policy, batch = policy_and_batch(current=0.5, old=0.2, reference=-0.1)
    loss, metrics = NFT(beta=0.3, advantage_clip=4.0, kl=0.25, old_policy="linear").loss(policy, batch)
    x_t = add_noise(batch.x0, batch.eps, batch.t)
    v, v_old, v_ref = (policy.velocity(role, x_t, batch.t, batch.conditioning) for role in ("current", "old", "reference"))
    r = optimality(batch.advantages, 4.0)
    expected = nft_loss(v, v_old, batch.eps - batch.x0, batch.t, r, beta=0.3, clip=4.0) + 0.25 * velocity_kl(v, v_ref)
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(metrics["kl"], velocity_kl(v, v_ref).detach())
    torch.testing.assert_close(metrics["deviation"], velocity_kl(v, v_old).detach())
    assert not any(value.requires_grad for value in metrics.values())


@pytest.mark.parametrize("kl", [0.0, 0.1])
def test_the_objective_returns_the_metrics_it_names(kl):
    policy, batch = policy_and_batch(current=0.5, old=0.2, reference=-0.1)
    objective = NFT(beta=1.0, advantage_clip=5.0, kl=kl, old_policy="linear")
    _, metrics = objective.loss(policy, batch)
    assert set(metrics) == set(objective.metrics)
    assert all(value.shape == (N,) for value in metrics.values())
    assert ("reference" in policy.asked) == bool(kl)


def test_equal_policies_cost_one_forward_and_leave_the_gradient_as_it_is():
    objective = NFT(beta=0.4, advantage_clip=5.0, kl=0.0, old_policy="copy")
    policy, batch = policy_and_batch(current=0.5, old=0.5)
    loss, metrics = objective.loss(policy, batch)
    loss.sum().backward()
    assert policy.asked == ["current"] and (metrics["deviation"] == 0).all()
    apart, _ = policy_and_batch(current=0.5, old=0.5 + 1e-9)
    objective.loss(apart, batch)[0].sum().backward()
    torch.testing.assert_close(policy.weights["current"].grad, apart.weights["current"].grad, rtol=1e-6, atol=1e-6)


def test_after_a_rollout_the_old_policy_moves_by_its_schedule():
    policy, _ = policy_and_batch(current=0.5, old=0.2)
    NFT(beta=1.0, advantage_clip=5.0, kl=0.0, old_policy="linear").after_rollout(policy, 40)
    assert policy.averaged == [("old", pytest.approx(0.04))]


# training times --------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [1, 4, 10])
def test_times_of_the_rollout_are_its_own_levels_without_replacement_and_without_0(number):
    sigmas = sigma_schedule(10, 3.0)
    times = draw_times("rollout", number, sigmas, torch.clone, generator(0, "t"))
    assert len(set(times.tolist())) == number and set(times.tolist()) <= set(sigmas[:-1].tolist())
    drawn = [tuple(draw_times("rollout", number, sigmas, torch.clone, generator(0, "t", k)).tolist()) for k in range(60)]
    assert {t for times in drawn for t in times} == set(sigmas[:-1].tolist())  # every level has its turn
    assert len(set(drawn)) > 5


@pytest.mark.parametrize("number", [1, 4, 9])
@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_stratified_times_fall_one_in_each_equal_part_before_they_are_shifted_as_the_levels_are(number, shift):
    for k in range(20):
        times = draw_times("stratified", number, torch.ones(1), partial(Levels.fixed(shift).at, steps=10), generator(0, "t", k))
        assert times.dtype == torch.float32 and (times > 0).all() and (times <= 1).all()
        u = times.double() / (shift - (shift - 1) * times.double())  # t = k u / (1 + (k - 1) u), solved for u
        within = (u - 0.02) / 0.98 * number - torch.arange(number)
        assert (within > -1e-4).all() and (within < 1 + 1e-4).all()


def test_times_that_do_not_exist_are_refused():
    with pytest.raises(ValueError, match="of 4 steps has no 5"):
        draw_times("rollout", 5, sigma_schedule(4), torch.clone, generator(0, "t"))
    with pytest.raises(ValueError, match="'uniform' is not"):
        draw_times("uniform", 2, sigma_schedule(4), torch.clone, generator(0, "t"))


def test_consistency_shifts_every_advantage_and_is_flow_matching_on_ones_own_images():
    policy, batch = policy_and_batch(current=0.5, old=0.2)
    shifted = dataclasses.replace(batch, advantages=batch.advantages + 0.7)
    settings = {"beta": 1.0, "advantage_clip": 5.0, "kl": 0.0, "old_policy": "linear"}
    ours, _ = NFT(**settings, consistency=0.7).loss(policy, batch)
    theirs, _ = NFT(**settings).loss(policy, shifted)
    torch.testing.assert_close(ours, theirs)
