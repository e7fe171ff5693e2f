"""RTDMD's formulas against Gaussian data, whose velocities are known in closed form, and against autograd of the losses they stand for.

A student whose images are N(mu, STD^2) has N((1 - t) mu, (1 - t)^2 STD^2 + t^2) at t. Everything is linear in x and in the
noises, so most expectations are exact: coefficients are read off by asking with 1 and 0.
"""

import math
from itertools import pairwise, product
from typing import Any

import pytest
import torch
from forward_cases import along, gradient, slopes
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from flowtilt.flow import add_noise, per_sample, predict_x0, sigma_schedule
from flowtilt.objectives.rtdmd import (
    consistency_loss,
    distribution_matching_gradient,
    draw_renoise_times,
    fake_score_loss,
    kappa,
    renoise,
    target_variance,
)
from flowtilt.solvers import sde_step

FEW = settings(deadline=None, max_examples=40)
N, SHAPE, PIXELS, ETA = 4, (2, 3, 3), 18, 0.9
MU, STD = 0.8, 0.4
S = torch.tensor([0.0, 0.5, 0.75, 0.9], dtype=torch.float64)
T = torch.tensor([0.4, 0.52, 0.98, 0.91], dtype=torch.float64)
levels = st.floats(0, 0.95)
gaps = st.floats(0.01, 1)
"""Of the way from s to 1."""


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def variance_at(t: Any, std: float = STD) -> Any:
    return (1 - t) ** 2 * std**2 + t**2


def velocity(x: Tensor, t: Tensor | float, mu: float = MU, std: float = STD) -> Tensor:
    """E[eps - x0 | x_t = x] of N(mu, std^2) data."""
    t = per_sample(t, x)
    return -mu + (t - (1 - t) * std**2) / variance_at(t, std) * (x - (1 - t) * mu)


def coefficients(s: float, t: float) -> tuple[list[float], list[float]]:
    """Of x_s and of n: in x_t, and in the target."""
    of = torch.eye(2, dtype=torch.float64)
    x_t, target, _ = renoise(of[:, :1], s, t, of[:, 1:])
    return x_t.flatten().tolist(), target.flatten().tolist()


# noising on ------------------------------------------------------------------------------------------


@FEW
@given(t=st.floats(0.01, 1))
def test_from_an_image_it_is_the_ordinary_path_and_its_velocity(t):
    x0, n = draw(N, *SHAPE), draw(N, *SHAPE, seed=1)
    x_t, target, weight = renoise(x0, 0.0, t, n)
    torch.testing.assert_close(x_t, add_noise(x0, n, t), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(target, n - x0, rtol=1e-12, atol=1e-12)
    assert weight.shape == (N,) and float(weight[0]) == pytest.approx(min(1, 10 * t**2))


@FEW
@given(s=levels, first=gaps, second=gaps)
def test_two_noisings_are_one_and_each_keeps_the_marginals(s, first, second):
    t = s + (1 - s) * first * 0.9
    later = t + (1 - t) * second
    (a, r), (a2, r2), (a_both, r_both) = (coefficients(*times)[0] for times in ((s, t), (t, later), (s, later)))
    assert a2 * a == pytest.approx(a_both, abs=1e-12)
    assert (a2 * r) ** 2 + r2**2 == pytest.approx(r_both**2, abs=1e-12)
    assert a * (1 - s) == pytest.approx(1 - t) and (a * s) ** 2 + r**2 == pytest.approx(t**2)  # of x0, and of the noise


@FEW
@given(s=st.floats(0.01, 0.95))
def test_close_to_s_nothing_is_added_and_nothing_weighs(s):
    x_s, n = draw(N, *SHAPE), draw(N, *SHAPE, seed=1)
    x_t, _, weight = renoise(x_s, s, s + 1e-9, n)
    torch.testing.assert_close(x_t, x_s, rtol=0, atol=5e-3)
    assert 0 < float(weight[0]) < 1e-5


@FEW
@given(s=levels, gap=st.floats(0.01, 0.99))
def test_the_target_is_the_slope_of_x_t(s, gap):
    x_s, n, t, h = draw(N, *SHAPE), draw(N, *SHAPE, seed=1), s + (1 - s) * gap, 1e-4 * (1 - s) * min(gap, 1 - gap)
    slope = (renoise(x_s, s, t + h, n)[0] - renoise(x_s, s, t - h, n)[0]) / (2 * h)
    torch.testing.assert_close(renoise(x_s, s, t, n)[1], slope, rtol=1e-5, atol=1e-5)


@FEW
@given(s=levels, gap=gaps, mu=st.floats(-2, 2), std=st.floats(0.05, 2))
def test_what_is_learnt_from_x_s_is_the_velocity_of_the_marginals(s, gap, mu, std):
    """Regression of the target on x_t in closed form: x_s at level s has mean (1 - s) mu, and the x0 behind it is never asked for."""
    t = s + (1 - s) * gap
    (a, r), (p, q) = coefficients(s, t)
    slope = (a * p * variance_at(s, std) + r * q) / (a**2 * variance_at(s, std) + r**2)
    intercept = (p - slope * a) * (1 - s) * mu
    exact = velocity(torch.tensor([0.0, 1.0], dtype=torch.float64), t, mu, std)
    assert slope == pytest.approx(float(exact[1] - exact[0]), rel=1e-7, abs=1e-7)
    assert intercept == pytest.approx(float(exact[0]), rel=1e-7, abs=1e-7)


@pytest.mark.parametrize(("s", "t"), [(0.0, 0.3), (0.5, 0.51), (0.9, 0.95)])
def test_the_variance_is_that_of_sampled_targets_around_their_regression(s, t):
    x_t, target, _ = renoise(draw(200_000, 1), s, t, draw(200_000, 1, seed=1))
    moments = torch.cov(torch.cat([x_t, target], 1).T)
    left = moments[1, 1] - moments[0, 1] ** 2 / moments[0, 0]
    assert float(left) == pytest.approx(float(target_variance(s, t)), rel=0.02)  # six standard errors


@FEW
@given(s=levels, gap=gaps)
def test_the_variance_in_closed_form(s, gap):
    t = s + (1 - s) * gap
    (a, r), (p, q) = coefficients(s, t)
    left = p**2 + q**2 - (a * p + r * q) ** 2 / (a**2 + r**2)
    found = target_variance(torch.tensor([s], dtype=torch.float64), torch.tensor([t], dtype=torch.float64))
    assert found.shape == (1,) and float(found) == pytest.approx(left, rel=1e-6)


def test_the_variance_grows_a_hundredfold_from_images_to_the_noisiest_level():
    table = {0.9: (490, 136, 107), 0.75: (159, 22.4, 16.7), 0.5: (53, 6, 4.2)}
    for s, row in table.items():
        assert [float(target_variance(s, t)) for t in (s + 0.01, (1 + s) / 2, 0.98)] == pytest.approx(row, rel=0.01)
    assert [float(target_variance(0.0, t)) for t in (0.02, 0.5, 0.98)] == pytest.approx((1.04, 2, 1.04), rel=0.01)


def test_times_that_do_not_rise_or_leave_the_path_are_refused():
    x = torch.zeros(2, 3)
    for s, t in ((0.5, 0.5), (0.5, 0.4), (1.0, 1.0), (0.9, 1.1), (-0.1, 0.5), (0.5, math.nan), (torch.tensor([0.1, 0.9]), 0.5)):
        with pytest.raises(ValueError, match="0 <= s < t <= 1"):
            renoise(x, s, t, x)
    with pytest.raises(ValueError, match="scalar or have shape"):
        renoise(x, torch.zeros(3), 0.5, x)


def test_every_sample_has_levels_of_its_own():
    x, n, v, w, z = (draw(N, *SHAPE, seed=seed) for seed in range(5))
    together = renoise(x, S, T, n)
    g = distribution_matching_gradient(x, together[0], v, w, S, T, z)
    for i in range(N):
        alone = renoise(x[i : i + 1], float(S[i]), float(T[i]), n[i : i + 1])
        for one, all_ in zip(alone, together, strict=True):
            torch.testing.assert_close(one, all_[i : i + 1])
        row = slice(i, i + 1)
        found = distribution_matching_gradient(x[row], alone[0], v[row], w[row], float(S[i]), float(T[i]), z[row])
        torch.testing.assert_close(found, g[row])


def test_fp32_keeps_its_digits_where_t_is_close_to_s():
    x, s = torch.zeros(3, 1), torch.tensor([0.9, 0.5, 0.1])
    t = s + torch.tensor([1e-4, 1e-3, 1e-4])
    weight, exact = renoise(x, s, t, x)[2], renoise(x.double(), s.double(), t.double(), x.double())[2]
    torch.testing.assert_close(weight.double(), exact, rtol=2e-6, atol=0)
    of_step, of_exact = kappa(t, s, ETA), t.double() * (1 - s.double()) - s.double() * (1 - t.double()) * math.cos(ETA * math.pi / 2)
    torch.testing.assert_close(of_step.double(), of_exact, rtol=1e-6, atol=0)
    assert torch.equal(kappa(t, s, 0.0), t - s)


# times -----------------------------------------------------------------------------------------------


@FEW
@given(s=st.floats(0, 0.969))
def test_times_are_uniform_between_their_bounds_with_no_place_of_their_own(s):
    """Linear in a uniform number, so uniform; and different numbers are different times."""
    u = torch.arange(8) / 8
    t = draw_renoise_times(torch.full((8,), s), u)
    low = max(s + 0.01, 0.02)
    torch.testing.assert_close(t, low + (0.98 - low) * u)
    assert (t > s).all() and (t < 0.98).all()
    assert torch.equal(draw_renoise_times(s, u), t)


def test_a_level_that_leaves_no_times_is_refused():
    for s in (0.97, 0.99, 1.0, -0.1, math.nan):
        with pytest.raises(ValueError, match=r"fewer steps"):
            draw_renoise_times(torch.tensor([0.5, s]), torch.zeros(2))
    longest = {shift: max(n for n in range(1, 40) if n == 1 or sigma_schedule(n, shift)[1] < 0.97) for shift in (1.0, 3.0)}
    assert longest == {1.0: 33, 3.0: 11}


# the fake score --------------------------------------------------------------------------------------


def test_the_fake_scores_loss_is_the_codes_with_the_scale_moved_out():
    x_s, n, v = draw(N, *SHAPE), draw(N, *SHAPE, seed=1), draw(N, *SHAPE, seed=2)
    x_t, target, weight = renoise(x_s, S, T, n)
    r = (x_t - per_sample((1 - T) / (1 - S), x_s) * x_s) / n
    scaled = (1 / r**2).clamp(0, 10) * (r * v - r * target).square()
    torch.testing.assert_close(fake_score_loss(v, target, weight), scaled.flatten(1).mean(1))
    assert float(weight.min()) < 1 == float(weight.max())


def test_the_fake_scores_gradient_reaches_its_velocity_alone():
    v, target, weight = draw(N, *SHAPE), draw(N, *SHAPE, seed=1).requires_grad_(), torch.tensor([1.0, 0.5, 0.1, 0.0]).double()
    found = gradient(lambda x: fake_score_loss(x, target, weight), v)
    torch.testing.assert_close(found, 2 * per_sample(weight, v) * (v - target.detach()) / PIXELS)
    assert target.grad is None


@pytest.mark.parametrize(("s", "t"), [(0.0, 0.5), (0.5, 0.7), (0.9, 0.95)])
def test_the_exact_velocity_is_where_the_fake_score_rests(s, t):
    """Along any linear change of the velocity the gradient is 0 but for sampling: five standard errors."""
    number = 20_000
    x_s = (1 - s) * MU + math.sqrt(variance_at(s)) * draw(number, 1)
    x_t, target, weight = renoise(x_s, s, t, draw(number, 1, seed=1))

    def total(wrong: Tensor) -> Tensor:
        return fake_score_loss(velocity(x_t, t) + wrong[0] + wrong[1] * x_t, target, weight).mean(0, keepdim=True)

    bound = 10 * float(weight[0]) * math.sqrt(float(target_variance(s, t)) / number) * (1 + float(x_t.square().mean().sqrt()))
    assert gradient(total, torch.zeros(2, dtype=torch.float64)).abs().max() < bound
    assert (gradient(total, torch.full((2,), 2.0, dtype=torch.float64)) > bound).all()


def test_consistency_is_the_squared_bias_whatever_the_variance():
    """Over all signs of two independent errors the mean is exact; a square would have the error's too."""
    h, bias, e1, e2 = draw(N, *SHAPE), draw(N, *SHAPE, seed=1), draw(N, *SHAPE, seed=2), draw(N, *SHAPE, seed=3)
    signs = list(product((1, -1), repeat=2))
    two = sum(consistency_loss(h, h + bias + i * e1, h + bias + j * e2) for i, j in signs) / 4
    one = sum(consistency_loss(h, h + bias + i * e1, h + bias + i * e1) for i, _ in signs) / 4
    squared = bias.square().flatten(1).mean(1)
    torch.testing.assert_close(two, squared)
    torch.testing.assert_close(one, squared + e1.square().flatten(1).mean(1))


@pytest.mark.parametrize(("t", "later"), [(0.9, 0.75), (0.5, 0.31)])
def test_the_exact_denoiser_of_one_image_is_consistent_and_that_of_gaussian_data_off_by_the_mean_of_its_step(t, later):
    x, z = draw(N, *SHAPE), draw(N, *SHAPE, seed=1)
    for std, exact in ((0.0, True), (STD, False)):

        def h(x: Tensor, t: float, std: float = std) -> Tensor:
            return predict_x0(x, velocity(x, t, std=std), t)

        signs = list(product((1, -1), repeat=2))
        ends = {i: sde_step(x, velocity(x, t, std=std), t, later, i * z, "cps", ETA) for i in (1, -1)}
        found = sum(consistency_loss(h(x, t), h(ends[i][0], later), h(ends[j][0], later)) for i, j in signs) / 4
        bias = h(ends[1][1], later) - h(x, t)
        torch.testing.assert_close(found, bias.square().flatten(1).mean(1), rtol=1e-9, atol=1e-20)
        assert (found < 1e-20).all() if exact else (found > 1e-6).all()


def test_consistency_teaches_all_three_predictions():
    parts = [draw(N, *SHAPE, seed=seed) for seed in range(3)]
    direction = draw(N, *SHAPE, seed=9)
    for k in range(3):

        def loss(x: Tensor, k: int = k) -> Tensor:
            return consistency_loss(*(x if i == k else part for i, part in enumerate(parts)))

        torch.testing.assert_close(along(gradient(loss, parts[k]), direction), slopes(loss, parts[k], direction), rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("later", [0.0, 0.4])
def test_at_an_image_consistency_vanishes_with_its_gradient(later):
    x, z, t = draw(N, *SHAPE), draw(2, N, *SHAPE, seed=1), 0.6

    def loss(w: Tensor) -> Tensor:
        """Of the velocity w x, which the steps have detached."""
        ends = [sde_step(x, (w * x).detach(), t, later, z[k], "cps", ETA)[0] for k in range(2)]
        return consistency_loss(predict_x0(x, w * x, t), *(predict_x0(end, w * end, later) for end in ends))

    w = torch.tensor(0.7, dtype=torch.float64)
    values, slope = loss(w).abs().max(), gradient(loss, w).abs()
    assert (values < 1e-20 and slope < 1e-14) if later == 0 else (values > 1e-3 and slope > 1e-3)


# steps and matching ----------------------------------------------------------------------------------


def test_the_four_steps_are_the_papers():
    sigmas = sigma_schedule(4, shift=3.0)
    assert sigmas.tolist() == pytest.approx([1, 0.9, 0.75, 0.5, 0])
    assert kappa(sigmas[:-1], sigmas[1:], ETA).tolist() == pytest.approx([0.1, 0.21327, 0.35545, 0.5], abs=1e-5)
    x = torch.zeros(1, 1)
    rho = [float(sde_step(x, x, s, s_next, x, "cps", ETA)[2]) for s, s_next in pairwise(sigmas)]
    assert rho == pytest.approx([0.88892, 0.74077, 0.49384, 0], abs=1e-5)


@FEW
@given(s=st.floats(0.05, 1), fraction=st.floats(0, 0.95), eta=st.floats(0, 1))
def test_kappa_is_how_a_step_answers_its_velocity(s, fraction, eta):
    x, z, v, w = draw(4, N, *SHAPE).unbind()
    sigma, sigma_next = torch.tensor([s, s * fraction], dtype=torch.float64)
    moved = sde_step(x, v, sigma, sigma_next, z, "cps", eta)[0] - sde_step(x, w, sigma, sigma_next, z, "cps", eta)[0]
    torch.testing.assert_close(moved, -kappa(sigma, sigma_next, eta) * (v - w), rtol=1e-9, atol=1e-12)


def test_a_step_of_eta_1_keeps_nothing_of_the_old_noise():
    x, v, z = draw(3, N, *SHAPE).unbind()
    found, _, _ = sde_step(x, v, 0.9, 0.5, z, "cps", 1.0)
    torch.testing.assert_close(found, add_noise(predict_x0(x, v, 0.9), z, 0.5))


def test_the_gradient_is_the_difference_of_the_two_projections_over_the_distance_to_the_teachers():
    x_s, n, z, v_t, v_f = draw(5, N, *SHAPE).unbind()
    x_t, _, _ = renoise(x_s, S, T, n)
    y_t, mean, _ = sde_step(x_t, v_t, T, S, z, "cps", ETA)
    y_f, _, _ = sde_step(x_t, v_f, T, S, z, "cps", ETA)
    for noise, centre in ((z, y_t), (None, mean)):
        expected = (y_f - y_t) / per_sample((x_s - centre).abs().flatten(1).mean(1), x_s)
        torch.testing.assert_close(distribution_matching_gradient(x_s, x_t, v_t, v_f, S, T, noise), expected, rtol=1e-9, atol=1e-12)
    # at s = 0 there is no noise, and the step is x0's
    assert torch.equal(*(distribution_matching_gradient(x_s, x_t, v_t, v_f, S, T, noise)[0] for noise in (z, None)))


def test_where_the_scores_agree_nothing_moves_and_exchanged_they_pull_the_other_way():
    x_s, n, z, v_t, v_f = draw(5, N, *SHAPE).unbind()
    x_t, _, _ = renoise(x_s, S, T, n)
    assert (distribution_matching_gradient(x_s, x_t, v_t, v_t, S, T, z) == 0).all()
    there, back = (distribution_matching_gradient(x_s, x_t, *pair, S, T, z) for pair in ((v_t, v_f), (v_f, v_t)))
    ratio = (there / back).flatten(1)
    assert (ratio < 0).all()
    torch.testing.assert_close(ratio, ratio[:, :1].expand_as(ratio))  # a sample's normaliser is all that differs


def test_the_gradient_does_not_know_the_unit_of_latents():
    parts = draw(5, N, *SHAPE)
    g = [distribution_matching_gradient(x_s, x_t, v, w, S, T, z) for x_s, x_t, v, w, z in (parts, 7 * parts)]
    torch.testing.assert_close(*g)


@pytest.mark.parametrize("s", [0.0, 0.5])
def test_a_step_down_moves_x_s_towards_the_teachers_projection(s):
    """With x_s where its own score projects to, the step leads straight there, and one of the normaliser's length arrives."""
    x_t, v_t, v_f, z = draw(4, N, *SHAPE).unbind()
    x_s, y_t = (sde_step(x_t, v, 0.8, s, z, "cps", ETA)[0] for v in (v_f, v_t))
    g = distribution_matching_gradient(x_s, x_t, v_t, v_f, s, 0.8, z)
    length = per_sample((x_s - y_t).abs().flatten(1).mean(1), x_s)
    torch.testing.assert_close(x_s - length * g, y_t)


@pytest.mark.parametrize("mean_normaliser", [False, True])
@pytest.mark.parametrize(("s", "rate"), [(0.0, 0.3), (0.5, 0.3), (0.9, 1.0)])
def test_a_student_with_its_own_exact_score_finds_the_teachers_mean(s, rate, mean_normaliser):
    mu, number, off = -1.0, 64, []
    for k in range(80):
        x0, eps, n, z = draw(4, number, PIXELS, seed=k).unbind()
        x_s = add_noise(mu + STD * x0, eps, s)
        t = draw_renoise_times(s, torch.arange(number, dtype=torch.float64) / number)
        x_t, _, _ = renoise(x_s, s, t, n)
        v_t, v_f = velocity(x_t, t, MU), velocity(x_t, t, mu)
        mu -= rate * float(distribution_matching_gradient(x_s, x_t, v_t, v_f, s, t, None if mean_normaliser else z).mean())
        off.append(MU - mu)
    assert all(0 <= b <= a for a, b in pairwise(off)) and off[-1] < 0.05


def test_scores_that_differ_in_their_last_digits_have_a_gradient_of_all_digits():
    """fp32: two projections of size 1 would leave two digits of a difference of 1e-5."""
    x_s, n, z, v_t, other = draw(5, N, *SHAPE).float().unbind()
    s, t = torch.full((N,), 0.5), torch.full((N,), 0.6)
    x_t, _, _ = renoise(x_s, s, t, n)
    parts = (x_s, x_t, v_t, v_t + 1e-4 * other, s, t, z)
    found, exact = distribution_matching_gradient(*parts), distribution_matching_gradient(*(part.double() for part in parts))
    projections = [sde_step(x_t.double(), v.double(), t, s, z.double(), "cps", ETA)[0] for v in (parts[2], parts[3])]
    scale = (x_s - projections[0]).abs().flatten(1).mean(1)
    torch.testing.assert_close(exact, (projections[1] - projections[0]) / per_sample(scale, exact), rtol=1e-6, atol=1e-9)
    torch.testing.assert_close(found.double(), exact, rtol=2e-6, atol=0)


def test_only_0_over_0_is_0():
    x, v, z = torch.ones(3, 2), torch.zeros(3, 2), torch.zeros(3, 2)
    w = torch.tensor([[0.0, 0.0], [0.0, 1.0], [0.0, math.nan]])
    # from x_t = x_s with a velocity of 0 the teacher leads to x_s itself
    g = distribution_matching_gradient(x, x, v, w, 0.0, 0.5, z)
    assert g[0].tolist() == [0, 0]
    assert g[1].tolist() == [0, -math.inf]
    assert float(g[2, 0]) == 0 and g[2, 1].isnan()
    assert distribution_matching_gradient(x, x, torch.full_like(v, math.nan), v, 0.0, 0.5, z).isnan().all()


def test_neither_teacher_nor_fake_score_gets_a_gradient():
    x_s, x_t, v_t, v_f, z = (part.requires_grad_() for part in draw(5, N, *SHAPE).unbind())
    assert not distribution_matching_gradient(x_s, x_t, v_t, v_f, S, T, z).requires_grad
