"""AWM is PPO's loss on a matching error: its weightings, its clip, its gradient where the policies agree; in float64."""

import math

import pytest
import torch
from forward_cases import SHAPE, N, along, draw, gradient, policy_and_batch, slopes
from torch import Tensor

from flowtilt.flow import add_noise
from flowtilt.objectives.awm import AWM, awm_loss, matching_log_prob
from flowtilt.objectives.forward import velocity_kl
from flowtilt.objectives.grpo import grpo_loss

WEIGHTINGS = ["ghuber", "uniform"]


def error(v: Tensor, target: Tensor) -> Tensor:
    return (v - target).square().mean((1, 2, 3))


def test_the_uniform_log_probability_is_minus_the_matching_error():
    case = draw()
    torch.testing.assert_close(matching_log_prob(case.v, case.v_target, case.t, "uniform"), -error(case.v, case.v_target))


def test_the_generalised_huber_is_a_fourth_root_times_four_t():
    case = draw()
    found = matching_log_prob(case.v, case.v_target, case.t)
    expected = -4 * case.t * (error(case.v, case.v_target) ** 0.25 - 1e-10**0.25)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-9)
    at_one_time = matching_log_prob(case.v, case.v_target, 0.4)
    torch.testing.assert_close(at_one_time, matching_log_prob(case.v, case.v_target, torch.full_like(case.t, 0.4)))


def test_its_gradient_is_the_errors_over_its_own_three_quarter_power():
    """d log p = -t l^(-3/4) dl: a sample far off weighs less than its error, one near more."""
    case = draw()
    weight = case.t * error(case.v, case.v_target) ** -0.75
    expected = -weight.view(-1, 1, 1, 1) * gradient(lambda v: error(v, case.v_target), case.v)
    torch.testing.assert_close(gradient(lambda v: matching_log_prob(v, case.v_target, case.t), case.v), expected, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("weighting", WEIGHTINGS)
def test_a_perfect_prediction_has_log_probability_0_and_a_finite_gradient(weighting):
    case = draw()
    found = matching_log_prob(case.v_target.float(), case.v_target.float(), case.t.float(), weighting)
    assert found.dtype == torch.float32 and found.abs().max() < 1e-6
    assert (gradient(lambda v: matching_log_prob(v, case.v_target, case.t, weighting), case.v_target) == 0).all()
    near = gradient(lambda v: matching_log_prob(v, case.v_target, case.t, weighting), case.v_target + 1e-9)
    assert near.isfinite().all()


def test_an_unknown_weighting_is_refused_by_name():
    with pytest.raises(ValueError, match="'huber' is not 'uniform' or 'ghuber'"):
        matching_log_prob(draw().v, draw().v_old, 0.5, "huber")


@pytest.mark.parametrize("weighting", WEIGHTINGS)
def test_where_the_policies_agree_the_gradient_is_that_of_reinforce(weighting):
    case = draw()
    found = gradient(lambda v: awm_loss(v, case.v, case.v_target, case.t, case.advantages, weighting=weighting), case.v)
    plain = gradient(lambda v: -case.advantages * matching_log_prob(v, case.v_target, case.t, weighting), case.v)
    torch.testing.assert_close(found, plain)


@pytest.mark.parametrize("weighting", WEIGHTINGS)
@pytest.mark.parametrize("seed", range(3))
def test_the_gradient_is_the_finite_difference_of_the_loss(weighting, seed):
    case, direction = draw(seed), draw(seed + 10).v

    def loss(v: Tensor) -> Tensor:
        return awm_loss(v, case.v_old, case.v_target, case.t, case.advantages, clip_range=0.9, weighting=weighting)

    torch.testing.assert_close(along(gradient(loss, case.v), direction), slopes(loss, case.v, direction), rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize(("share", "clipped"), [(0.1, False), (0.9, True)])
def test_the_published_clip_acts_only_where_a_good_image_is_more_than_twice_as_likely(share, clipped):
    """c = 1: a ratio is never below 0, so nothing is clipped on that side. From error 1 to (1 - share)^2, log rho = 1 - (1 - share)^2."""
    case = draw()
    v, target = case.v_old + share, case.v_old + 1
    assert (1 - (1 - share) ** 2 > math.log(2)) == clipped
    for advantage in (0.5, -0.5):
        a = torch.full_like(case.t, advantage)
        found = gradient(lambda x, a=a: awm_loss(x, case.v_old, target, case.t, a, weighting="uniform"), v)
        assert bool((found == 0).all()) == (clipped and advantage > 0)


def test_a_constant_on_every_advantage_changes_no_expected_gradient_where_the_policy_is_the_mean_of_its_targets():
    case = draw()
    v = case.v[:1].expand(N, *SHAPE)
    half = draw(1).v[: N // 2]
    targets = v + torch.cat([half, -half])

    def total(a: Tensor) -> Tensor:
        return gradient(lambda x: awm_loss(x, v, targets, 0.6, a), v).sum(0)

    torch.testing.assert_close(total(case.advantages + 3), total(case.advantages), rtol=0, atol=1e-12)
    assert total(case.advantages).abs().max() > 1e-3


def test_the_old_policy_never_gets_a_gradient():
    case = draw()
    case.v.requires_grad_(), case.v_old.requires_grad_()
    awm_loss(case.v, case.v_old, case.v_target, case.t, case.advantages).sum().backward()
    assert case.v_old.grad is None and case.v.grad is not None


@pytest.mark.parametrize("weighting", WEIGHTINGS)
def test_the_method_is_the_loss_on_clipped_advantages_and_the_anchor(weighting):
    policy, batch = policy_and_batch(current=0.5, old=0.2)
    settings = {"clip_range": 0.3, "advantage_clip": 4.0, "weighting": weighting, "anchor": 0.6, "consistency": 0.5}
    found, metrics = AWM(**settings, kl=0.0, old_policy="short").loss(policy, batch)
    x_t = add_noise(batch.x0, batch.eps, batch.t)
    v, v_old = (policy.velocity(role, x_t, batch.t, batch.conditioning) for role in ("current", "old"))
    logs = [matching_log_prob(each, batch.eps - batch.x0, batch.t, weighting) for each in (v, v_old)]
    advantages = torch.tensor([-1.0, -1.5 / 4, 2.5 / 4, 1.0], dtype=torch.float64)  # of -6, -2, 2, 6, and 0.5 each
    torch.testing.assert_close(found, grpo_loss(*logs, advantages, 0.3) + 0.6 * velocity_kl(v, v_old))
    torch.testing.assert_close(metrics["anchor"], velocity_kl(v, v_old).detach())
