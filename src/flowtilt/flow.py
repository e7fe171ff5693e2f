"""Rectified flow: the straight path from data to noise and the velocity along it.

    x_t = (1 - t) x0 + t eps,    eps ~ N(0, I),    v = dx_t/dt = eps - x0

t and sigma are the same number in [0, 1]: 0 is data, 1 is noise. Latents are [N, ...] and fp32; t is a
scalar or [N]. Liu et al., arXiv 2209.03003; the schedule's shift is Stable Diffusion 3's, 2403.03206.
"""

import torch
from torch import Tensor


def per_sample(t: Tensor | float, like: Tensor) -> Tensor:
    """t as a tensor that multiplies `like` [N, ...] sample by sample: [] or [N, 1, 1, ...].

    Raises:
        ValueError: t is neither a scalar nor [N].
    """
    t = torch.as_tensor(t, dtype=like.dtype, device=like.device)
    if t.ndim == 0:
        return t
    if t.shape != like.shape[:1]:
        raise ValueError(f"t must be a scalar or have shape [{len(like)}], got {list(t.shape)}")
    return t.view(-1, *[1] * (like.ndim - 1))


def add_noise(x0: Tensor, eps: Tensor, t: Tensor | float) -> Tensor:
    """x_t = (1 - t) x0 + t eps."""
    t = per_sample(t, x0)
    return (1 - t) * x0 + t * eps


def velocity_target(x0: Tensor, eps: Tensor) -> Tensor:
    """v = eps - x0, what the network is to predict at every t."""
    return eps - x0


def predict_x0(x_t: Tensor, v: Tensor, t: Tensor | float) -> Tensor:
    """The data that velocity v at x_t points to: x0 = x_t - t v."""
    return x_t - per_sample(t, x_t) * v


def predict_eps(x_t: Tensor, v: Tensor, t: Tensor | float) -> Tensor:
    """The noise that velocity v at x_t comes from: eps = x_t + (1 - t) v."""
    return x_t + (1 - per_sample(t, x_t)) * v


def sigma_schedule(num_steps: int, shift: float = 1.0) -> Tensor:
    """Noise levels of a sampler: [num_steps + 1], fp32, strictly falling from 1 to 0.

    s_i = linspace(1, 1/n, n), shifted by s <- k s / (1 + (k - 1) s), then a final 0. SD3 has k = 3.

    Raises:
        ValueError: num_steps < 1 or shift <= 0.
    """
    if num_steps < 1 or not shift > 0:
        raise ValueError(f"num_steps must be at least 1 and shift above 0, got {num_steps} and {shift}")
    s = torch.linspace(1, 1 / num_steps, num_steps, dtype=torch.float64)
    s = shift * s / (1 + (shift - 1) * s)
    return torch.cat([s, s.new_zeros(1)]).float()
