"""Solvers against the one flow that is known in closed form, that of Gaussian data, and single steps by hand.

For x0 ~ N(MEAN, STD^2) the marginal at t is N(m, V), m = (1 - t) MEAN and V = (1 - t)^2 STD^2 + t^2, so
    v(x, t) = E[eps - x0 | x_t = x] = m' + V' / (2 V) (x - m)
is linear in x, and its ODE keeps the standardised coordinate (x - m) / sqrt(V).
"""

import math
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from flowtilt.flow import add_noise, predict_eps, predict_x0, sigma_schedule
from flowtilt.solvers import SOLVERS, log_prob, sde_step, solve

FEW = settings(deadline=None, max_examples=25)
MEAN, STD = 0.8, 0.4
SECOND_ORDER = ("dpm2", "heun")


def mean_at(t: float) -> float:
    return (1 - t) * MEAN


def variance_at(t: float) -> float:
    return (1 - t) ** 2 * STD**2 + t**2


def gaussian_velocity(x: Tensor, sigma: Tensor | float) -> Tensor:
    """The exact velocity of Gaussian data."""
    t = float(sigma)
    half_slope = t - (1 - t) * STD**2
    return -MEAN + half_slope / variance_at(t) * (x - mean_at(t))


def carry(x: Tensor, t: float, t_next: float) -> Tensor:
    """The exact flow of Gaussian data from t to t_next."""
    return mean_at(t_next) + math.sqrt(variance_at(t_next) / variance_at(t)) * (x - mean_at(t))


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


# ODE solvers -----------------------------------------------------------------------------------------


def test_the_velocity_that_these_tests_trust_is_the_slope_of_the_flow_that_they_trust():
    x = draw(5)
    for t in (0.0, 0.3, 0.7, 1.0):
        slope = (carry(x, t, t + 1e-5) - carry(x, t, t - 1e-5)) / 2e-5
        torch.testing.assert_close(gaussian_velocity(x, t), slope, rtol=1e-7, atol=1e-7)


def orders(solver: str, shift: float, steps: tuple[int, ...]) -> list[float]:
    """Measured orders of convergence from noise to data, from each number of steps to the next, its double."""
    x = draw(4, 2, 3, 3)
    errors = [float((solve(gaussian_velocity, x, sigma_schedule(n, shift), solver) - carry(x, 1, 0)).abs().max()) for n in steps]
    assert errors[-1] < (2e-3 if solver in SECOND_ORDER else 5e-2)
    return [math.log2(error / halved) for error, halved in pairwise(errors)]


@pytest.mark.parametrize("solver", ["euler", "ddim", "dpm1", "heun"])
@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_a_solver_converges_to_the_exact_flow_at_its_order(solver, shift):
    assert orders(solver, shift, (40, 80, 160)) == pytest.approx([2 if solver in SECOND_ORDER else 1] * 2, abs=0.1)


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_dpm2_converges_to_the_exact_flow_at_second_order_but_for_a_logarithm(shift):
    """In lambda the steps at both ends do not shrink: the error is h^2 log(1 / h), whose measured order nears 2 from below."""
    first, second, third = orders("dpm2", shift, (160, 320, 640, 1280))
    assert 1.5 < first < second < third < 2


@pytest.mark.parametrize("solver", SOLVERS)
def test_a_solver_keeps_its_order_between_levels_that_are_not_the_ends(solver):
    x = draw(6)
    errors = []
    for n in (20, 40, 80):
        sigmas = torch.linspace(0.9, 0.1, n + 1)
        errors.append(float((solve(gaussian_velocity, x, sigmas, solver) - carry(x, float(sigmas[0]), float(sigmas[-1]))).abs().max()))
    for error, halved in pairwise(errors):
        assert math.log2(error / halved) == pytest.approx(2 if solver in SECOND_ORDER else 1, abs=0.25)


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("steps", [1, 2, 3, 7])
def test_data_that_is_one_point_is_reached_exactly_in_any_number_of_steps(solver, steps):
    """v = (x - point) / t: the paths are straight and x0_hat is the point at every level."""
    point = draw(2, 3, seed=5)
    x0 = solve(lambda x, sigma: (x - point) / sigma.double(), draw(2, 3), sigma_schedule(steps, 3.0), solver)
    torch.testing.assert_close(x0, point, rtol=0, atol=1e-12)


@pytest.mark.parametrize("other", ["ddim", "dpm1"])
@pytest.mark.parametrize("levels", [sigma_schedule(7, 3.0), torch.tensor([0.93, 0.6, 0.2, 0.05])])
def test_ddim_and_first_order_dpm_are_euler_on_this_path(other, levels):
    def velocity(x: Tensor, sigma: Tensor) -> Tensor:
        return torch.tanh(3 * x) * (1 + sigma.double())

    x = draw(3, 2, 4, 4)
    torch.testing.assert_close(solve(velocity, x, levels, other), solve(velocity, x, levels, "euler"), rtol=1e-12, atol=1e-12)


def test_a_dpm1_step_is_its_closed_form():
    x, v = draw(2, 3), draw(2, 3, seed=1)
    s, s_next = torch.tensor([0.8, 0.3]).tolist()
    h = math.log((1 - s_next) / s_next) - math.log((1 - s) / s)
    expected = s_next / s * x - (1 - s_next) * (math.exp(-h) - 1) * (x - s * v)
    torch.testing.assert_close(solve(lambda *_: v, x, torch.tensor([0.8, 0.3]), "dpm1"), expected, rtol=1e-12, atol=1e-12)


def test_dpm2_takes_two_first_order_steps_from_noise_and_then_extrapolates_its_predictions():
    levels = torch.tensor([1.0, 0.8, 0.5, 0.2])
    s = levels.tolist()
    slopes = [draw(2, 3, seed=k) for k in range(3)]
    calls = iter(slopes)
    found = solve(lambda *_: next(calls), draw(2, 3, seed=9), levels, "dpm2")

    x = draw(2, 3, seed=9)
    x = s[1] * x + (1 - s[1]) * (x - slopes[0])  # from s = 1
    previous = x - s[1] * slopes[1]
    x = x + (s[2] - s[1]) * slopes[1]  # lambda(1) is minus infinity: still first order
    lam = [math.log((1 - t) / t) for t in s[1:]]
    h, h_before = lam[2] - lam[1], lam[1] - lam[0]
    newest = x - s[2] * slopes[2]
    direction = newest + (newest - previous) * h / (2 * h_before)
    expected = s[3] / s[2] * x - (1 - s[3]) * math.expm1(-h) * direction
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("solver", SOLVERS)
def test_the_last_step_returns_the_predicted_data(solver):
    """Whatever was before: after the first steps the velocity is a constant c, and the end is x - s c."""
    levels = torch.tensor([0.9, 0.6, 0.25, 0.0])
    seen: list[Tensor] = []

    def velocity(x: Tensor, sigma: Tensor) -> Tensor:
        seen.append(predict_x0(x, torch.sin(5 * x), sigma))
        return torch.sin(5 * x)

    x0 = solve(velocity, draw(2, 3), levels, solver)
    torch.testing.assert_close(x0, seen[-1], rtol=0, atol=1e-14)


@pytest.mark.parametrize("solver", SOLVERS)
def test_the_black_box_is_called_once_a_step_with_the_exact_levels(solver):
    sigmas, seen = sigma_schedule(10, 3.0), []

    def velocity(x: Tensor, sigma: Tensor) -> Tensor:
        assert sigma.shape == () and sigma.dtype == torch.float32
        seen.append(float(sigma))
        return torch.zeros_like(x)

    solve(velocity, torch.zeros(1, 2), sigmas, solver)
    s = sigmas.tolist()
    heun = [level for a, b in pairwise(s[:-1]) for level in (a, b)] + [s[-2]]
    assert seen == (heun if solver == "heun" else s[:-1])


@pytest.mark.parametrize("solver", SOLVERS)
def test_solving_leaves_the_noise_as_it_was_and_keeps_its_dtype(solver):
    x = draw(2, 3).float()
    before = x.clone()
    assert solve(lambda x, sigma: x.mul(0.5), x, sigma_schedule(4), solver).dtype == torch.float32
    assert torch.equal(x, before)


@pytest.mark.parametrize("solver", SOLVERS)
def test_samples_do_not_see_each_other(solver):
    x = draw(3, 2, 2)
    alone = torch.cat([solve(gaussian_velocity, row[None], sigma_schedule(5, 3.0), solver) for row in x])
    assert torch.equal(solve(gaussian_velocity, x, sigma_schedule(5, 3.0), solver), alone)


@pytest.mark.parametrize(
    "sigmas", [[1.0, 0.5, 0.5, 0.0], [0.0, 0.5, 1.0], [1.0], [], [1.5, 0.5, 0.0], [1.0, 0.5, -0.1], [1.0, float("nan"), 0.0]]
)
def test_levels_that_do_not_fall_within_0_and_1_are_refused(sigmas):
    with pytest.raises(ValueError, match="must fall strictly"):
        solve(gaussian_velocity, torch.zeros(1, 2), torch.tensor(sigmas))


def test_levels_of_two_axes_are_refused():
    with pytest.raises(ValueError, match="must fall strictly"):
        solve(gaussian_velocity, torch.zeros(1, 2), sigma_schedule(4)[None])


def test_an_unknown_solver_is_refused_by_name():
    with pytest.raises(ValueError, match="'dpm3' is not one of euler, ddim, dpm1, dpm2, heun"):
        solve(gaussian_velocity, torch.zeros(1, 2), sigma_schedule(4), "dpm3")


# stochastic steps ------------------------------------------------------------------------------------

KINDS = ("flow", "dance", "cps")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("s", "s_next"), [(0.9, 0.7), (0.3, 0.0)])
def test_without_noise_a_stochastic_step_is_euler(kind, s, s_next):
    x, v = draw(2, 3), draw(2, 3, seed=1)
    euler = x + (s_next - s) * v
    x_next, mean, std = sde_step(x, v, s, s_next, draw(2, 3, seed=2), kind, eta=0.0)
    torch.testing.assert_close(mean, euler, rtol=1e-14, atol=1e-14)
    assert torch.equal(x_next, mean) and float(std) == 0
    errors = [float((sde_step(x, v, s, s_next, draw(2, 3, seed=2), kind, eta)[1] - euler).abs().max()) for eta in (1e-2, 1e-3)]
    assert errors[1] == pytest.approx(errors[0] / 100, rel=1e-2, abs=1e-12)  # the mean's correction is of order eta^2


@pytest.mark.parametrize("kind", KINDS)
def test_the_next_sample_is_the_mean_and_noise_times_std(kind):
    x, v, noise = draw(4, 2, 3, 3), draw(4, 2, 3, 3, seed=1), draw(4, 2, 3, 3, seed=2)
    x_next, mean, std = sde_step(x, v, torch.tensor([0.9, 0.8, 0.7, 0.6]), torch.tensor([0.8, 0.5, 0.3, 0.0]), noise, kind)
    assert std.shape == (4, 1, 1, 1) and mean.shape == x.shape
    assert torch.equal(x_next, mean + std * noise)
    assert sde_step(x, v, 0.9, 0.5, noise, kind)[2].shape == ()


@pytest.mark.parametrize("kind", KINDS)
def test_a_level_per_sample_is_each_sample_alone(kind):
    x, v, noise = draw(3, 2, 2), draw(3, 2, 2, seed=1), draw(3, 2, 2, seed=2)
    s, s_next = torch.tensor([1.0, 0.8, 0.4], dtype=torch.float64), torch.tensor([0.9, 0.5, 0.0], dtype=torch.float64)
    together = sde_step(x, v, s, s_next, noise, kind, 0.6, sigma_max=0.9)
    for i in range(3):
        rows = slice(i, i + 1)
        alone = sde_step(x[rows], v[rows], float(s[i]), float(s_next[i]), noise[rows], kind, 0.6, sigma_max=0.9)
        for a, b in zip(together, alone, strict=True):
            torch.testing.assert_close(a[rows].squeeze(), b.squeeze(), rtol=1e-14, atol=1e-14)


def marginal_after(kind: str, s: float, s_next: float, eta: float, sigma_max: float | None = None) -> tuple[float, float]:
    """Mean and variance after one step from the exact marginal: the step's mean is A x + B, linear in x."""
    points = torch.tensor([[0.0], [1.0]], dtype=torch.float64)
    _, mean, std = sde_step(points, gaussian_velocity(points, s), s, s_next, torch.zeros_like(points), kind, eta, sigma_max)
    constant, slope = float(mean[0]), float(mean[1] - mean[0])
    return slope * mean_at(s) + constant, slope**2 * variance_at(s) + float(std) ** 2


def predictions_of_gaussian_data(s: float) -> tuple[float, float]:
    """How E[x0 | x] and E[eps | x] grow with x."""
    return (1 - s) * STD**2 / variance_at(s), s / variance_at(s)


@pytest.mark.parametrize("eta", [0.1, 0.7, 1.0])
@pytest.mark.parametrize("shift", [1.0, 3.0])
@pytest.mark.parametrize("kind", KINDS)
def test_the_marginal_after_a_step_is_known_in_closed_form_at_every_level_of_a_schedule(kind, shift, eta):
    """The mean is linear in x: its slope from the score -(x - m) / V for the two SDEs, from the two predictions for cps."""
    levels = sigma_schedule(10, shift).double().tolist()
    for s, s_next in pairwise(levels):
        of_x0, of_eps = predictions_of_gaussian_data(s)
        dt = s_next - s
        if kind == "cps":
            slope = (1 - s_next) * of_x0 + s_next * math.cos(eta * math.pi / 2) * of_eps
            noise = (s_next * math.sin(eta * math.pi / 2)) ** 2
        else:
            g2 = eta**2 * s / (1 - (s if s < 1 else levels[1])) if kind == "flow" else eta**2
            slope = 1 + dt * (of_eps - of_x0) + dt * g2 / 2 / variance_at(s)
            noise = g2 * -dt
        mean, variance = marginal_after(kind, s, s_next, eta, sigma_max=levels[1])
        assert mean == pytest.approx(mean_at(s_next), abs=1e-12)  # whatever the noise
        assert variance == pytest.approx(slope**2 * variance_at(s) + noise, rel=1e-9)


@pytest.mark.parametrize("shift", [1.0, 3.0])
@pytest.mark.parametrize("kind", KINDS)
def test_as_eta_vanishes_the_marginal_becomes_eulers_at_every_level(kind, shift):
    levels = sigma_schedule(10, shift).double().tolist()
    for s, s_next in pairwise(levels):
        of_x0, of_eps = predictions_of_gaussian_data(s)
        euler = (1 + (s_next - s) * (of_eps - of_x0)) ** 2 * variance_at(s)
        errors = [abs(marginal_after(kind, s, s_next, eta, sigma_max=levels[1])[1] - euler) for eta in (1e-2, 1e-3, 0.0)]
        assert errors[1] == pytest.approx(errors[0] / 100, rel=0.05, abs=1e-13) and errors[2] < 1e-13


@pytest.mark.parametrize("kind", ["flow", "dance"])
@pytest.mark.parametrize("s", [0.9, 0.5, 0.2])
def test_a_small_step_keeps_the_marginal_of_gaussian_data_to_second_order(kind, s):
    """A wrong sign or factor of the score would leave an error of first order, halved only by half a step."""
    errors = []
    for dt in (1e-2, 5e-3, 2.5e-3):
        mean, variance = marginal_after(kind, s, s - dt, eta=0.7)
        errors.append(abs(mean - mean_at(s - dt)) + abs(variance - variance_at(s - dt)))
        assert errors[-1] < 20 * dt**2
    for error, halved in pairwise(errors):
        assert error / halved == pytest.approx(4, rel=0.05)


@FEW
@given(s=st.floats(0.1, 1), fraction=st.floats(0, 0.95), eta=st.floats(0, 1))
def test_cps_keeps_the_coefficients_of_data_and_noise_exactly(s, fraction, eta):
    """With x0_hat and eps_hat known, x' = (1 - s') x0 + noise of variance s'^2, part kept and part fresh."""
    s_next = s * fraction
    data, eps = torch.tensor([[1.0], [0.0]], dtype=torch.float64), torch.tensor([[0.0], [1.0]], dtype=torch.float64)
    _, mean, std = sde_step(add_noise(data, eps, s), eps - data, s, s_next, torch.zeros_like(data), "cps", eta)
    of_data, of_eps = mean[:, 0].tolist()
    assert of_data**2 == pytest.approx((1 - s_next) ** 2, abs=1e-12)
    assert of_eps**2 + float(std) ** 2 == pytest.approx(s_next**2, abs=1e-12)
    assert of_data >= 0 and of_eps >= 0


def test_the_last_cps_step_is_the_predicted_data():
    x, v = draw(2, 3), draw(2, 3, seed=1)
    x_next, _, std = sde_step(x, v, 0.1, 0.0, draw(2, 3, seed=2), "cps")
    assert float(std) == 0
    torch.testing.assert_close(x_next, predict_x0(x, v, 0.1), rtol=0, atol=1e-14)


def test_the_noise_of_each_kind_is_its_formula():
    x, s, s_next, eta = torch.zeros(1, 2, dtype=torch.float64), 0.8, 0.55, 0.7
    std = {kind: float(sde_step(x, x, s, s_next, x, kind, eta)[2]) for kind in KINDS}
    assert std["flow"] == pytest.approx(eta * math.sqrt(s / (1 - s)) * math.sqrt(s - s_next))
    assert std["dance"] == pytest.approx(eta * math.sqrt(s - s_next))
    assert std["cps"] == pytest.approx(s_next * math.sin(eta * math.pi / 2))


def test_a_dance_step_moves_along_the_score_of_the_predicted_noise():
    """score = -eps_hat / s, and time falls: the drift gains eta^2 / 2 eps_hat / s."""
    x, v, s, s_next, eta = draw(2, 3), draw(2, 3, seed=1), 0.6, 0.5, 0.3
    expected = x + (s_next - s) * (v + eta**2 / 2 * predict_eps(x, v, s) / s)
    torch.testing.assert_close(sde_step(x, v, s, s_next, x, "dance", eta)[1], expected, rtol=1e-12, atol=1e-12)


def test_a_flow_step_from_pure_noise_needs_the_second_level():
    x, v, levels = draw(2, 3), draw(2, 3, seed=1), torch.tensor([1.0, 0.5], dtype=torch.float64)
    with pytest.raises(ValueError, match="sigma_max"):
        sde_step(x, v, 1.0, 0.9, x, "flow")
    with pytest.raises(ValueError, match="sigma_max"):
        sde_step(x, v, levels, levels - 0.1, x, "flow")
    with pytest.raises(ValueError, match="sigma_max"):
        sde_step(x, v, 1.0, 0.9, x, "flow", sigma_max=1.0)
    _, mean, std = sde_step(x, v, levels, levels - 0.1, x, "flow", 0.7, sigma_max=0.9)
    assert float(std[0]) == pytest.approx(0.7 * math.sqrt(1 / (1 - 0.9)) * math.sqrt(0.1))
    assert float(std[1]) == pytest.approx(0.7 * math.sqrt(0.5 / 0.5) * math.sqrt(0.1))  # below 1 its own level counts
    g2 = 0.49 / (1 - 0.9)
    torch.testing.assert_close(mean[0], x[0] * (1 - g2 * 0.1 / 2) - 0.1 * v[0], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("kind", ["dance", "cps"])
def test_other_kinds_start_from_pure_noise_as_they_are(kind):
    x = draw(2, 3)
    assert all(part.isfinite().all() for part in sde_step(x, x, 1.0, 0.9, x, kind))


def test_an_unknown_kind_is_refused_by_name():
    with pytest.raises(ValueError, match="'ode' is not one of flow, dance, cps"):
        sde_step(torch.zeros(1, 2), torch.zeros(1, 2), 0.5, 0.4, torch.zeros(1, 2), "ode")


@pytest.mark.parametrize("spread", [lambda: torch.tensor(0.3), lambda: torch.tensor([0.2, 1.0, 3.0]).view(3, 1, 1, 1)])
def test_the_log_probability_is_that_of_a_normal_averaged_over_pixels(spread: Callable[[], Any]):
    x_next, mean, std = draw(3, 2, 4, 4), draw(3, 2, 4, 4, seed=1), spread().double()
    expected = torch.distributions.Normal(mean, std.expand_as(mean)).log_prob(x_next).mean((1, 2, 3))
    torch.testing.assert_close(log_prob(x_next, mean, std), expected)


def test_the_log_probability_of_a_step_is_highest_at_its_mean():
    x, v, noise = draw(2, 3), draw(2, 3, seed=1), draw(2, 3, seed=2)
    x_next, mean, std = sde_step(x, v, 0.8, 0.6, noise)
    mean = mean.requires_grad_()
    log_prob(x_next.detach(), mean, std).sum().backward()
    torch.testing.assert_close(mean.grad, (noise / std / 3).detach())
    assert (log_prob(mean.detach(), mean.detach(), std) > log_prob(x_next, mean, std)).all()


@pytest.mark.parametrize("std", [torch.tensor(0.0), torch.tensor([0.5, 0.0]).view(2, 1), torch.tensor(float("nan"))])
def test_a_deterministic_step_has_no_log_probability(std):
    with pytest.raises(ValueError, match="deterministic"):
        log_prob(torch.zeros(2, 3), torch.zeros(2, 3), std)
