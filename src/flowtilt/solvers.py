"""Samplers of a rectified flow: ODE solvers around a black-box velocity, and stochastic steps, one at a time or all the way.

Noise levels are sigma = t in [0, 1], falling; s is the present level, s' the next, dt = s' - s < 0.
An ODE solver carries x from sigmas[0] to sigmas[-1] along dx/dt = v(x, t). A stochastic step draws
from a Gaussian whose log-density policy-gradient methods need (formulas beside each).
"""

import math
from collections.abc import Callable
from itertools import pairwise
from typing import Literal, get_args

import torch
from torch import Tensor

from flowtilt.flow import per_sample, predict_eps, predict_x0

Solver = Literal["euler", "ddim", "dpm1", "dpm2", "heun"]
SOLVERS: tuple[str, ...] = get_args(Solver)
SAMPLERS: tuple[str, ...] = (*SOLVERS, "cps")
"""The ways from noise to an image: the ODE solvers, and `solve_cps`."""
Stochastic = Literal["flow", "dance", "cps"]
Velocity = Callable[[Tensor, Tensor], Tensor]


def solve(velocity: Velocity, x: Tensor, sigmas: Tensor, solver: str = "dpm2") -> Tensor:
    """Carries noise x [N, ...] along the levels `sigmas` [S + 1] to x0.

    euler: x' = x + (s' - s) v. ddim: x' = (1 - s') x0_hat + s' eps_hat, the same map on this path.
    dpm1, dpm2: DPM-Solver++ (arXiv 2211.01095), first order and second-order multistep. heun: the
    trapezoid, two evaluations a step but the last. Global error O(h) for the first three, O(h^2) for
    dpm2 and heun.

    Args:
        velocity: v(x, sigma) with sigma a scalar fp32 tensor on x's device; called once a step (heun: twice).
        sigmas: strictly falling, fp32, within [0, 1]; the last is usually 0.

    Raises:
        ValueError: an unknown solver, or sigmas that do not fall or leave [0, 1].
    """
    if solver not in SOLVERS:
        raise ValueError(f"solver {solver!r} is not one of {', '.join(SOLVERS)}")
    levels = _levels(sigmas)
    past: tuple[float, Tensor] | None = None
    for i, (s, s_next) in enumerate(pairwise(levels)):
        v = velocity(x, sigmas[i].to(x.device))
        if solver in ("dpm1", "dpm2"):
            x0 = predict_x0(x, v, s)
            x = _dpm_step(x, x0, s, s_next, past if solver == "dpm2" else None)
            past = (s, x0)
        elif solver == "ddim":
            x = (1 - s_next) * predict_x0(x, v, s) + s_next * predict_eps(x, v, s)
        elif solver == "heun" and s_next > 0:
            ahead = velocity(x + (s_next - s) * v, sigmas[i + 1].to(x.device))
            x = x + (s_next - s) * (v + ahead) / 2
        else:
            x = x + (s_next - s) * v
    return x


def solve_cps(velocity: Velocity, x: Tensor, sigmas: Tensor, fresh: Callable[[int], Tensor], eta: float) -> Tensor:
    """Carries noise x [N, ...] along the levels `sigmas` [S + 1] by steps of `sde_step(kind="cps")`; the one to 0 gives x0_hat.

    Args:
        velocity: v(x, sigma) with sigma a scalar fp32 tensor on x's device; called once a step.
        sigmas: strictly falling, fp32, within [0, 1]; the last is usually 0.
        fresh: standard normal noise [N, ...] on x's device of a step, counted from 0; not asked for the one to 0.
        eta: how much of the noise is new, in (0, 1].

    Raises:
        ValueError: sigmas that do not fall or leave [0, 1].
    """
    for j, (_, s_next) in enumerate(pairwise(_levels(sigmas))):
        s = sigmas[j].to(x.device)
        v = velocity(x, s)
        x = sde_step(x, v, s, s_next, fresh(j), "cps", eta)[0] if s_next > 0 else predict_x0(x, v, s)
    return x


def _levels(sigmas: Tensor) -> list[float]:
    """Noise levels [S + 1] as numbers, once they are seen to fall."""
    if sigmas.ndim != 1 or len(sigmas) < 2 or not (sigmas.diff() < 0).all() or sigmas[0] > 1 or sigmas[-1] < 0:
        raise ValueError(f"sigmas must fall strictly within [0, 1], got {sigmas.tolist()}")
    return sigmas.tolist()


def _log_snr(s: float) -> float:
    """lambda(s) = log((1 - s) / s)."""
    return math.log((1 - s) / s)


def _dpm_step(x: Tensor, x0: Tensor, s: float, s_next: float, past: tuple[float, Tensor] | None) -> Tensor:
    """x' = (s'/s) x - (1 - s') expm1(-h) D with h = lambda(s') - lambda(s).

    D = x0 in first order; x0 + (x0 - p) h / (2 (lambda(s) - lambda(s_p))) with the prediction p made at
    s_p. lambda(1) is minus infinity, so the first step and the one after it are of first order; at
    s' = 0 the step is x0 itself.
    """
    if s_next == 0:
        return x0
    if s >= 1:
        return s_next * x + (1 - s_next) * x0
    h = _log_snr(s_next) - _log_snr(s)
    direction = x0
    if past is not None and past[0] < 1:
        direction = x0 + (x0 - past[1]) * (h / (2 * (_log_snr(s) - _log_snr(past[0]))))
    return (s_next / s) * x - (1 - s_next) * math.expm1(-h) * direction


def sde_step(
    x: Tensor,
    v: Tensor,
    sigma: Tensor | float,
    sigma_next: Tensor | float,
    noise: Tensor,
    kind: str = "flow",
    eta: float = 0.7,
    sigma_max: float | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """One stochastic step s -> s' < s; returns (x_next, mean, std) with x_next = mean + std noise.

    flow  FlowGRPO, arXiv 2505.05470:  g = eta sqrt(s / (1 - s)), std = g sqrt(-dt),
          mean = x (1 + g^2 dt / (2 s)) + v (1 + g^2 (1 - s) / (2 s)) dt
    dance DanceGRPO, arXiv 2505.07818: std = eta sqrt(-dt), mean = x + v dt - eta^2/2 score dt with
          score = -(x - (1 - s) x0_hat) / s^2; minus, since time runs from 1 to 0: dt < 0, and the drift
          of the reversed diffusion is v - eta^2/2 score
    cps   arXiv 2509.05952: std = s' sin(eta pi/2), mean = (1 - s') x0_hat + s' cos(eta pi/2) eps_hat

    eta = 0 is Euler for each. Shapes: x, v, noise and mean [N, ...]; std [] or [N, 1, ...].

    Args:
        sigma, sigma_next: scalar or [N], 0 <= sigma_next < sigma <= 1.
        sigma_max: replaces sigma in flow's 1 - s, which vanishes at s = 1; the schedule's second level there.

    Raises:
        ValueError: an unknown kind, or flow at s = 1 without sigma_max.
    """
    s, s_next = per_sample(sigma, x), per_sample(sigma_next, x)
    dt = s_next - s
    if kind == "flow":
        below = s if sigma_max is None else torch.where(s >= 1, torch.full_like(s, sigma_max), s)
        if (below >= 1).any():
            raise ValueError("flow step at sigma = 1: pass sigma_max, the schedule's second level")
        g = eta * (s / (1 - below)).sqrt()
        std = g * (-dt).sqrt()
        mean = x * (1 + g**2 * dt / (2 * s)) + v * (1 + g**2 * (1 - s) / (2 * s)) * dt
    elif kind == "dance":
        score = -(x - (1 - s) * predict_x0(x, v, sigma)) / s**2
        std = eta * (-dt).sqrt()
        mean = x + (v - 0.5 * eta**2 * score) * dt
    elif kind == "cps":
        angle = eta * math.pi / 2
        std = s_next * math.sin(angle)
        mean = (1 - s_next) * predict_x0(x, v, sigma) + s_next * math.cos(angle) * predict_eps(x, v, sigma)
    else:
        raise ValueError(f"kind {kind!r} is not one of {', '.join(get_args(Stochastic))}")
    return mean + std * noise, mean, std


def log_prob(x_next: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """log N(x_next; mean, std^2 I) averaged (not summed) over pixels and channels, as FlowGRPO has it; [N].

    Raises:
        ValueError: std is 0 somewhere: a deterministic step has no density.
    """
    if not (std > 0).all():
        raise ValueError("log_prob needs std > 0: a deterministic step has no density")
    density = -((x_next - mean) ** 2) / (2 * std**2) - std.log() - 0.5 * math.log(2 * math.pi)
    return density.flatten(1).mean(1)
