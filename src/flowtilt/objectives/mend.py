"""MEND, arXiv 2610.05954: which improvement of a sample is accepted, and the regression on it.

A sample x of reward R(x) is moved along the reward's gradient g,

    y_j = x + eta_j g / rms(g)

and the y_j of the greatest min(R(y_j), kappa) - mean (y_j - x)^2 / (2 tau) is accepted where that is more than min(R(x), kappa).
The denoiser at a state of the rollout is then to say d = y - x more than it did; where nothing was accepted, d = 0.

Shapes   N samples, J moves; latents, velocities, gradients [N, ...]; rewards [N] or [J, N]. Everything fp32.
Source   The formulas are those of the authors' code (545bfa5), and how fast the floor of kappa follows the rewards.
"""

import torch
from torch import Tensor

from flowtilt.flow import per_sample

FLOOR_DECAY = 0.9
"""Of the median's average below which kappa never falls."""
LEAST_ACCEPTED, MOST_ACCEPTED = 0.3, 0.6
TAU_FACTOR = 1.5


def moved(x: Tensor, gradient: Tensor, length: float) -> Tensor:
    """x + length g / rms(g), [N, ...]: the root mean square of each move is `length`, or 0 where the gradient is."""
    rms = per_sample(gradient.square().flatten(1).mean(1).sqrt(), x)
    return x + length * torch.where(rms > 0, gradient / rms.clamp_min(torch.finfo(x.dtype).tiny), 0.0)


def ceilings(rewards: Tensor, groups: Tensor, quantile: float, floor: float) -> Tensor:
    """kappa [N]: the quantile of the rewards of a sample's group, or the floor where that is higher.

    Args:
        groups: [N], equal for the samples of a prompt.
    """
    kappa = torch.empty_like(rewards)
    for group in groups.unique():
        kappa[groups == group] = torch.quantile(rewards[groups == group], quantile)
    return kappa.clamp_min(floor)


def raised_floor(floor: float | None, rewards: Tensor) -> float:
    """The average of the medians of all rollouts' rewards, which never falls; the first median where there is none yet."""
    median = float(rewards.median())
    return median if floor is None else max(floor, FLOOR_DECAY * floor + (1 - FLOOR_DECAY) * median)


def accepted(rewards: Tensor, tried: Tensor, squares: Tensor, kappa: Tensor, tau: float) -> Tensor:
    """Which move each sample accepts, [N] from 0 to J - 1; -1 for none.

    Args:
        rewards: R(x), [N].
        tried: R(y_j), [J, N].
        squares: mean (y_j - x)^2, [J, N].
        kappa: [N].
    """
    value, which = (torch.minimum(tried, kappa) - squares / (2 * tau)).max(0)
    return torch.where(value > torch.minimum(rewards, kappa), which, -1)


def adapted_tau(tau: float, share: float) -> float:
    """tau of the next rollout, where this share of the images accepted a move: dearer moves above .6, cheaper ones below .3."""
    if share > MOST_ACCEPTED:
        return tau / TAU_FACTOR
    return tau * TAU_FACTOR if share < LEAST_ACCEPTED else tau


def mend_loss(v: Tensor, v_old: Tensor, d: Tensor, sigma: Tensor | float) -> Tensor:
    """mean (x0_hat - x0_old - d)^2, [N], at a state of level sigma; x0_hat - x0_old = -sigma (v - v_old).

    Args:
        v: the only one that carries a gradient.
        v_old: of the policy that drew the sample.
        d: y - x, or 0.
    """
    return (per_sample(sigma, v) * (v - v_old.detach()) + d.detach()).square().flatten(1).mean(1)


def row_weights(takes: Tensor, keep: float) -> Tensor:
    """Weights [N] whose sum over the rows' losses is mean over accepted + keep mean over the others; takes is true where accepted."""
    number, others = int(takes.sum()), int((~takes).sum())
    return torch.where(takes, 1 / max(1, number), keep / max(1, others))
