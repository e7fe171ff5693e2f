"""The path from data to noise: its pieces are inverses of each other, and the schedule is its formula."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from flowtilt.flow import add_noise, per_sample, predict_eps, predict_x0, sigma_schedule, velocity_target

FEW = settings(deadline=None, max_examples=25)


def draw(seed: int = 0, n: int = 3) -> tuple[torch.Tensor, torch.Tensor]:
    """Data and noise [n, 2, 4, 4] in float64."""
    rng = torch.Generator().manual_seed(seed)
    return torch.randn(n, 2, 4, 4, generator=rng, dtype=torch.float64), torch.randn(n, 2, 4, 4, generator=rng, dtype=torch.float64)


@FEW
@given(t=st.floats(0, 1), seed=st.integers(0, 99))
def test_the_velocity_at_x_t_gives_back_data_and_noise(t, seed):
    x0, eps = draw(seed)
    x_t, v = add_noise(x0, eps, t), velocity_target(x0, eps)
    torch.testing.assert_close(predict_x0(x_t, v, t), x0)
    torch.testing.assert_close(predict_eps(x_t, v, t), eps)


@FEW
@given(t=st.floats(0, 1), seed=st.integers(0, 99))
def test_data_and_noise_of_any_velocity_lie_on_the_path_through_x_t(t, seed):
    """Also for a wrong v: (1 - t) x0_hat + t eps_hat = x_t and eps_hat - x0_hat = v."""
    x_t, v = draw(seed)
    x0_hat, eps_hat = predict_x0(x_t, v, t), predict_eps(x_t, v, t)
    torch.testing.assert_close(add_noise(x0_hat, eps_hat, t), x_t)
    torch.testing.assert_close(velocity_target(x0_hat, eps_hat), v)


def test_the_velocity_is_the_derivative_of_the_path():
    x0, eps = draw()
    t = torch.tensor([0.1, 0.5, 0.9], dtype=torch.float64)
    slope = (add_noise(x0, eps, t + 1e-3) - add_noise(x0, eps, t - 1e-3)) / 2e-3
    torch.testing.assert_close(slope, velocity_target(x0, eps))


def test_time_0_is_data_and_time_1_is_noise():
    x0, eps = draw()
    assert torch.equal(add_noise(x0, eps, 0.0), x0)
    assert torch.equal(add_noise(x0, eps, 1.0), eps)


@pytest.mark.parametrize("shape", [(4,), (4, 3), (4, 2, 3, 3)])
@pytest.mark.parametrize("function", [add_noise, predict_x0, predict_eps])
def test_a_time_per_sample_is_each_sample_alone_at_its_own_time(function, shape):
    a, b = torch.randn(2, *shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    t = torch.tensor([0.0, 0.3, 0.7, 1.0], dtype=torch.float64)
    together = function(a, b, t)
    for i in range(4):
        assert torch.equal(together[i], function(a[i : i + 1], b[i : i + 1], float(t[i]))[0])
        assert torch.equal(together[i], function(a[i : i + 1], b[i : i + 1], t[i])[0])


@pytest.mark.parametrize("shape", [(3,), (1,), (4, 1), (4, 1, 1, 1), (0,)])
@pytest.mark.parametrize("function", [add_noise, predict_x0, predict_eps])
def test_a_time_that_is_neither_a_scalar_nor_one_a_sample_is_refused(function, shape):
    x, y = draw(n=4)
    with pytest.raises(ValueError, match=r"scalar or have shape \[4\]"):
        function(x, y, torch.zeros(shape))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_times_take_the_dtype_of_what_they_multiply(dtype):
    x = torch.zeros(2, 3, dtype=dtype)
    assert per_sample(0.5, x).dtype == dtype
    assert per_sample(torch.tensor([0.5, 0.25], dtype=torch.float64), x).dtype == dtype
    assert per_sample(torch.tensor([0.5, 0.25]), x).shape == (2, 1)


@FEW
@given(n=st.integers(1, 100), shift=st.floats(0.1, 20))
def test_the_schedule_is_its_formula_and_falls_strictly_from_1_to_0(n, shift):
    sigmas = sigma_schedule(n, shift)
    assert sigmas.shape == (n + 1,) and sigmas.dtype == torch.float32
    assert sigmas[0] == 1 and sigmas[-1] == 0
    assert (sigmas.diff() < 0).all()
    for i in range(n):
        s = (n - i) / n
        assert float(sigmas[i]) == pytest.approx(shift * s / (1 + (shift - 1) * s), rel=1e-6)


def test_shifts_compose_and_shift_1_is_even():
    """k1 after k2 is k1 k2: in s / (1 - s) a shift is a factor."""
    assert torch.equal(sigma_schedule(8), torch.linspace(1, 0, 9))
    odds = [s[1:-1] / (1 - s[1:-1]) for s in (sigma_schedule(8).double(), sigma_schedule(8, 3.0).double())]
    torch.testing.assert_close(odds[1], 3 * odds[0], rtol=1e-5, atol=0)


@pytest.mark.parametrize(("steps", "shift"), [(0, 1.0), (-1, 1.0), (4, 0.0), (4, -3.0), (4, float("nan"))])
def test_a_schedule_without_steps_or_with_a_shift_that_is_not_positive_is_refused(steps, shift):
    with pytest.raises(ValueError, match="at least 1 and shift above 0"):
        sigma_schedule(steps, shift)
