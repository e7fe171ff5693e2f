"""RTDMD, arXiv 2605.26108: a few-step generator by distribution matching, then policy gradients on its stochastic steps.

The generator draws x_s, a state at one of its own noise levels s. A fake score learns the velocity of these from x_s
noised on to t; where the teacher's velocity there is another, x_s is moved. Here is the maths: who asks which network,
and when, is elsewhere.

Shapes   N samples; latents, velocities, noise [N, ...]; s, t, sigma [N] or a scalar; losses and weights [N].
         Everything fp32. Noise and uniform numbers come from the caller.
Time     t in [0, 1], 0 data, 1 noise; 0 <= s < t: noising goes from s up to t, the projection y back down.
    paper, or its code                               here
    x_t = a x_s + r n, target u*                     renoise
    loss of the fake score, scale moved out          fake_score_loss with renoise's weight
    ambient consistency, two samples                 consistency_loss
    CPS step x -> x', -d x' / d v                    solvers.sde_step "cps", kappa
    (y_F - y_T) / mean |x_s - y_T|                   distribution_matching_gradient
    SubGRPO: 2 of the first 3 steps                  subgrpo_steps
    x_s - sg(x_s - g), and each other loss           surrogate of its cotangent

What is ours: t is drawn on the clipped interval, where the code clips what it drew and so has one in five of the times
from s = .9 at .98; y_F - y_T is formed from the velocities; r^2 and kappa are written so that nothing cancels.
"""

import math

import torch
from torch import Tensor

from flowtilt.flow import per_sample
from flowtilt.seeding import generator
from flowtilt.solvers import sde_step

LEAST_TIME, MOST_TIME = 0.02, 0.98
LEAST_GAP = 0.01
"""t - s is never smaller: towards 0 the target's noise grows as 1 / sqrt(t - s)."""


def renoise(x_s: Tensor, s: Tensor | float, t: Tensor | float, noise: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """x_t = a x_s + r n on the path of x_s, the velocity there, and the weight of its error; [N, ...], [N, ...], [N].

    With a = (1 - t) / (1 - s) and r^2 = t^2 - a^2 s^2, x_t has the marginal of t wherever x_s has that of s. The target
    is dx_t/dt with x_s and n held,

        u* = -x_s / (1 - s) + (t + (1 - t) s^2 / (1 - s)^2) / r n

    whose mean given x_t is the velocity of the marginals: no x0 is needed. At s = 0 it is n - x_s. The weight,
    min(1, 10 r^2), is the code's min(1 / r^2, 10) of an error multiplied by r.

    Args:
        x_s: latents at level s.
        noise: n, standard normal [N, ...].

    Raises:
        ValueError: not 0 <= s < t <= 1 somewhere, or neither scalar nor [N].
    """
    s, t = per_sample(s, x_s), per_sample(t, x_s)
    if not ((s >= 0) & (s < t) & (t <= 1)).all():
        raise ValueError(f"renoising needs 0 <= s < t <= 1, got s = {s.flatten().tolist()} and t = {t.flatten().tolist()}")
    a, r2 = _noising(s, t)
    r = r2.sqrt()
    target = -x_s / (1 - s) + (t + (1 - t) * (s / (1 - s)) ** 2) / r * noise
    return a * x_s + r * noise, target, (10 * r2).clamp_max(1).flatten().expand(len(x_s))


def _noising(s: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
    """a and r^2 of x_t = a x_s + r n; t^2 - a^2 s^2 = (t - a s) (t + a s), whose first factor is (t - s) / (1 - s)."""
    a = (1 - t) / (1 - s)
    return a, (t - s) / (1 - s) * (t + a * s)


def target_variance(s: Tensor | float, t: Tensor | float) -> Tensor:
    """Variance V of `renoise`'s target given x_t, per coordinate, where x_s has variance 1; [N] or [].

    u* = -x_t / (1 - t) + k n with k = t / ((1 - t) r), and n has the variance a^2 / (a^2 + r^2) given x_t, so

        V = k^2 a^2 / (a^2 + r^2) = t^2 / ((1 - s)^2 r^2 (a^2 + r^2))

    What a fake score cannot learn at (s, t): 1 to 2 at s = 0, 100 and more at s = 0.9.

    Args:
        s, t: 0 <= s < t <= 1.
    """
    s, t = torch.as_tensor(s), torch.as_tensor(t)
    a, r2 = _noising(s, t)
    return (t / (1 - s)) ** 2 / (r2 * (a**2 + r2))


def draw_renoise_times(s: Tensor | float, u: Tensor) -> Tensor:
    """t uniform on [max(s + .01, .02), .98] for each sample, [N].

    Args:
        s: level of the samples, [N] or a scalar.
        u: uniform on [0, 1), [N].

    Raises:
        ValueError: not 0 <= s < .97: above, the interval is empty, and the target at a time of its own choosing would be
            all noise (`target_variance` is 1,000 and more). With shift 3 a schedule of 12 steps begins there, with shift 1
            one of 34.
    """
    s = per_sample(s, u)
    if not ((s >= 0) & (s + LEAST_GAP < MOST_TIME)).all():
        at_most = f"{MOST_TIME - LEAST_GAP:.2f}"
        raise ValueError(f"no times to noise to from s = {s.flatten().tolist()}: needs 0 <= s < {at_most}, so fewer steps or less shift")
    least = (s + LEAST_GAP).clamp_min(LEAST_TIME)
    return least + (MOST_TIME - least) * u


def fake_score_loss(v: Tensor, target: Tensor, weight: Tensor) -> Tensor:
    """w mean (v - target)^2 for each sample, [N].

    Args:
        v: the fake score's velocity at x_t, the only one that carries a gradient.
        target, weight: `renoise`'s, [N, ...] and [N]; another weight where variances are to be evened out.
    """
    return weight * (v - target.detach()).square().flatten(1).mean(1)


def consistency_loss(h: Tensor, h1: Tensor, h2: Tensor) -> Tensor:
    """mean (h1 - h) (h2 - h) for each sample, [N]: the fake score's denoiser is to be a martingale along its own steps.

    h(x, t) = x - t F(x, t). From x_t two CPS steps go down to t' < t by the same detached velocity F(x_t, t), with noises
    independent of each other; h1 and h2 are h(x', t') at their ends. The product's mean is |E[h(x', t') | x_t] - h(x_t, t)|^2,
    where a square's has the variance of h(x', t') besides; a single value may be negative. The gradient goes through all
    three. At t' = 0 a step ends at h itself: value and gradient vanish, so long as h1 = x'_1 - 0 F is still formed.

    Args:
        h: at (x_t, t), [N, ...].
        h1, h2: at (x'_1, t') and (x'_2, t').
    """
    return ((h1 - h) * (h2 - h)).flatten(1).mean(1)


def kappa(sigma: Tensor | float, sigma_next: Tensor | float, eta: float) -> Tensor:
    """-d x' / d v of a CPS step sigma -> sigma' < sigma, the same for every coordinate and every noise; [N] or [].

    sigma (1 - sigma') - sigma' (1 - sigma) cos(eta pi/2), written as sigma - sigma' and what a fresh noise adds to it.
    """
    sigma, sigma_next = torch.as_tensor(sigma), torch.as_tensor(sigma_next)
    return sigma - sigma_next + sigma_next * (1 - sigma) * 2 * math.sin(eta * math.pi / 4) ** 2


@torch.no_grad()
def distribution_matching_gradient(
    x_s: Tensor,
    x_t: Tensor,
    v_teacher: Tensor,
    v_fake: Tensor,
    s: Tensor | float,
    t: Tensor | float,
    noise: Tensor | None,
    eta: float = 0.9,
) -> Tensor:
    """g = (y_F - y_T) / mean |x_s - y_T|, along which -x_s moves towards the teacher; [N, ...], without gradient.

    y = CPS(x_t; t -> s) is where each velocity says that x_t came from, with one noise for both, which cancels:
    y_F - y_T = -kappa(t, s) (v_F - v_T). In the normaliser it stays, and is a floor to it where s > 0; at s = 0 there is
    none. The loss <x_s, sg(g)> / D, D the size of a sample, has the gradient of the paper's 1/2 mean (x_s - sg(x_s - g))^2.
    0/0 is 0; every other infinity or NaN stays, to be seen.

    Args:
        x_s, x_t: latents at s, and noised on to t by `renoise`.
        v_teacher: at x_t, with guidance.
        v_fake: at x_t.
        s, t: 0 <= s < t <= 1.
        noise: of the step, [N, ...]; None leaves it out of y_T, so that the normaliser has no floor.
        eta: of the step.
    """
    off = -kappa(per_sample(t, x_t), per_sample(s, x_t), eta) * (v_fake - v_teacher)
    y_teacher, _, _ = sde_step(x_t, v_teacher, t, s, torch.zeros_like(x_t) if noise is None else noise, "cps", eta)
    scale = per_sample((x_s - y_teacher).abs().flatten(1).mean(1), x_s)
    return torch.where((off == 0) & (scale == 0), torch.zeros_like(off), off / scale)


def surrogate(v: Tensor, cotangent: Tensor) -> Tensor:
    """<v, sg(cotangent)> for each sample, [N]: the gradient of its sum is the cotangent, its value means nothing.

    So a loss whose parts ask other networks, or decode an image, reaches the generator by one number a coordinate, and
    no two graphs are held at once.
    """
    return (v * cotangent.detach()).flatten(1).sum(1)


def subgrpo_steps(rollout: int, steps: int, number: int = 2, seed: int = 0) -> tuple[int, ...]:
    """Which `number` of the stochastic steps rollout number `rollout` trains, in order: uniform, without replacement.

    Args:
        rollout: from 0.
        steps: of the sampler; the last is deterministic and never among them.
        number: at least 1.
        seed: of the run.

    Raises:
        ValueError: fewer than `number` stochastic steps.
    """
    if not 1 <= number < steps:
        raise ValueError(f"{steps} steps have {max(0, steps - 1)} stochastic ones: {number} cannot be trained")
    order = torch.randperm(steps - 1, generator=generator(seed, "subgrpo", rollout))
    return tuple(sorted(order[:number].tolist()))
