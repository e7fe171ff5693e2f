"""RAM regresses on a target whose fixed point is the reference tilted by exp(m r); known in closed form for Gaussian data. In float64."""

import math

import pytest
import torch
from forward_cases import along, draw, gradient, policy_and_batch, slopes
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from flowtilt.flow import add_noise
from flowtilt.objectives.ram import RAM, ram_loss

FEW = settings(deadline=None, max_examples=25)
SPREAD = 0.4
"""Standard deviation of the data, which a linear reward does not change."""


def target(case, v_ref: Tensor, m: float) -> Tensor:
    return v_ref + m * case.advantages.view(-1, 1, 1, 1) * (case.v_target - case.v_old)


def test_the_loss_is_the_mean_square_to_its_target():
    case, v_ref = draw(), draw(1).v
    found = ram_loss(case.v, case.v_old, v_ref, case.v_target, case.advantages, 3.0)
    torch.testing.assert_close(found, (case.v - target(case, v_ref, 3.0)).square().mean((1, 2, 3)))


@pytest.mark.parametrize("seed", range(3))
def test_the_gradient_is_the_finite_difference_of_the_loss(seed):
    case, v_ref, direction = draw(seed), draw(seed + 1).v, draw(seed + 2).v

    def loss(v: Tensor) -> Tensor:
        return ram_loss(v, case.v_old, v_ref, case.v_target, case.advantages, 3.0)

    torch.testing.assert_close(along(gradient(loss, case.v), direction), slopes(loss, case.v, direction), rtol=1e-6, atol=1e-7)


def test_only_the_trained_policy_gets_a_gradient():
    case, v_ref = draw(), draw(1).v.requires_grad_()
    case.v.requires_grad_(), case.v_old.requires_grad_()
    ram_loss(case.v, case.v_old, v_ref, case.v_target, case.advantages, 3.0).sum().backward()
    assert case.v_old.grad is None and v_ref.grad is None and case.v.grad is not None


def test_an_average_image_pulls_to_the_reference():
    case, v_ref = draw(), draw(1).v
    found = gradient(lambda v: ram_loss(v, case.v_old, v_ref, case.v_target, torch.zeros_like(case.t), 50.0), case.v)
    torch.testing.assert_close(found, 2 * (case.v - v_ref) / case.v[0].numel())


# the fixed point -------------------------------------------------------------------------------------


def posterior(mean: float, x: float, t: float) -> tuple[float, float]:
    """Mean and standard deviation of x0 given x_t = x, for data N(mean, SPREAD^2)."""
    v = (1 - t) ** 2 * SPREAD**2 + t**2
    return mean + (1 - t) * SPREAD**2 / v * (x - (1 - t) * mean), SPREAD * t / math.sqrt(v)


def velocity(mean: float, x: float, t: float) -> float:
    """Of that data: E[eps - x0 | x_t = x] = (x - E[x0 | x]) / t."""
    return (x - posterior(mean, x, t)[0]) / t


def mean_gradient(v: float, data: float, x: float, t: float, *, m: float, slope: float, baseline: float) -> float:
    """Gradient of the expected loss at x_t = x, where the policy draws from N(data, SPREAD^2) and the reference from N(0, SPREAD^2).

    The reward is slope x0. The target is of second degree in x0, so the two points of equal mean and variance are enough.
    """
    mean, std = posterior(data, x, t)
    x0 = torch.tensor([[mean - std], [mean + std]], dtype=torch.float64)
    v_target = (x - x0) / t
    v_old, v_ref = (torch.full_like(x0, velocity(each, x, t)) for each in (data, 0.0))
    advantages = slope * x0[:, 0] - baseline
    found = gradient(lambda at: ram_loss(at, v_old, v_ref, v_target, advantages, m), torch.full_like(x0, v))
    return float(found.sum())


@FEW
@given(
    x=st.floats(-2, 2),
    t=st.floats(0.05, 0.999),
    m=st.floats(0.1, 50),
    slope=st.floats(-2, 2),
    baseline=st.floats(-1, 1),
)
def test_the_fixed_point_is_the_reference_tilted_by_the_exponential_reward(x, t, m, slope, baseline):
    """exp(m slope x0) moves the mean of N(0, s^2) by m slope s^2, and whatever is taken off the reward changes nothing."""
    tilted = m * slope * SPREAD**2
    setting = {"m": m, "slope": slope, "baseline": baseline}
    scale = (1 + abs(tilted) + m) / t**2
    assert mean_gradient(velocity(tilted, x, t), tilted, x, t, **setting) == pytest.approx(0, abs=1e-11 * scale)


def test_short_of_it_the_loss_drives_on_and_beyond_it_back():
    setting, tilted = {"m": 2.0, "slope": 1.5, "baseline": 0.1}, 2.0 * 1.5 * SPREAD**2
    short, beyond = (mean_gradient(velocity(data, 0.3, 0.5), data, 0.3, 0.5, **setting) for data in (0.5 * tilted, 1.5 * tilted))
    # a greater mean has a smaller velocity
    assert short > 0 and beyond < 0


def test_the_reference_is_the_fixed_point_where_nothing_is_rewarded():
    assert mean_gradient(velocity(0.0, 0.7, 0.4), 0.0, 0.7, 0.4, m=50.0, slope=0.0, baseline=0.0) == 0


# the method ------------------------------------------------------------------------------------------


def test_the_method_is_the_loss_at_x_t_and_always_asks_the_reference():
    policy, batch = policy_and_batch(current=0.5, old=0.2, reference=-0.1)
    objective = RAM(multiplier=3.0, old_policy="copy")
    found, metrics = objective.loss(policy, batch)
    assert policy.asked == ["current", "old", "reference"]
    x_t = add_noise(batch.x0, batch.eps, batch.t)
    v, v_old, v_ref = (policy.velocity(role, x_t, batch.t, batch.conditioning) for role in ("current", "old", "reference"))
    torch.testing.assert_close(found, ram_loss(v, v_old, v_ref, batch.eps - batch.x0, batch.advantages, 3.0))
    assert set(metrics) == {"loss", "kl", "norm_ratio"}
