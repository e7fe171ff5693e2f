"""FlowGRPO, arXiv 2505.05470: PPO's clipped policy gradient over the stochastic steps of a sampler.

With it GRPO-Guard (2510.22319), whose ratio has mean 1 and one variance at all noise levels, and the choice of
stochastic steps of FlowGRPO-Fast and MixGRPO (2507.21802).
Shapes   N samples; means of steps [N, ...]; log-densities, A, losses [N]; std [] or [N, 1, ...]; dt [] or [N].
Time     s falls from 1 to 0; a step goes from s to s', dt = s' - s < 0, std = g sqrt(-dt). Everything fp32.
    paper                                                here
    log p(x' | x), a mean over pixels                    solvers.log_prob
    max(-A rho, -A clip(rho, 1 - c, 1 + c))              grpo_loss
    |mu - mu_ref|^2 / (2 std^2)                          step_kl; the paper's code leaves dt out: path_kl
    Guard: log rho <- std (log rho + |dmu|^2/(2 std^2))  guard_log_ratio
    Guard: loss <- loss / -dt                            guard_loss
"""

from typing import get_args

import torch
from torch import Tensor

from flowtilt.flow import per_sample
from flowtilt.seeding import generator
from flowtilt.solvers import Stochastic


def grpo_loss(log_prob: Tensor, log_prob_old: Tensor, advantages: Tensor, clip_range: float) -> Tensor:
    """max(-A rho, -A clip(rho, 1 - c, 1 + c)) for each sample, [N]; rho = exp(log_prob - log_prob_old).

    The gradient ends where rho is above 1 + c and A > 0, or below 1 - c and A < 0: never on the way back.

    Args:
        log_prob: log p_theta of a stored step, the only one that carries a gradient.
        log_prob_old: log p of the policy that took it.
        clip_range: c > 0; small, since log p is a mean over pixels: 1e-5 to 1e-4 for SD3.
    """
    return _clipped(log_prob - log_prob_old.detach(), advantages, clip_range)


def _clipped(log_ratio: Tensor, advantages: Tensor, clip_range: float) -> Tensor:
    rho = log_ratio.exp()
    return -(advantages * rho).minimum(advantages * rho.clamp(1 - clip_range, 1 + clip_range))


def step_kl(mean: Tensor, mean_ref: Tensor, std: Tensor) -> Tensor:
    """KL of N(mean, std^2) to N(mean_ref, std^2), averaged over pixels: mean (mean - mean_ref)^2 / (2 std^2), [N].

    The gradient reaches `mean`. std > 0; a deterministic step has no KL, `forward.velocity_kl` is there for it.
    """
    return ((mean - mean_ref.detach()).square() / (2 * std**2)).flatten(1).mean(1)


def path_kl(mean: Tensor, mean_ref: Tensor, std: Tensor, dt: Tensor | float) -> Tensor:
    """-dt times `step_kl`, [N]: the FlowGRPO code's, which has g for std. Its published weights, .01 and .04, belong to this one."""
    kl = step_kl(mean, mean_ref, std)
    return -per_sample(dt, kl) * kl


def guard_log_ratio(x_next: Tensor, mean: Tensor, mean_old: Tensor, std: Tensor) -> Tensor:
    """GRPO-Guard's log-ratio, std (log rho + mean (mu - mu_old)^2 / (2 std^2)) for each sample, [N].

    The squares cancel and leave mean (x' - mu_old) (mu - mu_old) / std, which loses no digits where rho is near 1. With
    x' = mu_old + std z it is mean z (mu - mu_old): of mean 0 under the old policy, where log rho has a negative one, and
    of a variance that knows nothing of std. One clip range then serves all steps, on both sides.

    Args:
        x_next: the stored step x' [N, ...].
        mean: the trained policy's, the only one that carries a gradient.
        mean_old: of the policy that took the step.
    """
    mean_old = mean_old.detach()
    return ((x_next - mean_old) * (mean - mean_old) / std).flatten(1).mean(1)


def guard_loss(log_ratio: Tensor, advantages: Tensor, clip_range: float, dt: Tensor | float) -> Tensor:
    """GRPO-Guard's loss for each sample, [N]: `grpo_loss` of its ratio over -dt, so that no step's gradient outweighs another's.

    A step's mean moves with the velocity by about dt: without the division long steps decide.
    """
    return _clipped(log_ratio, advantages, clip_range) / -per_sample(dt, log_ratio)


def stochastic_steps(
    rollout: int, *, steps: int, span: tuple[int, int], window: str = "all", size: int = 1, every: int = 1, seed: int = 0
) -> range:
    """Which steps of rollout number `rollout` draw noise and are trained; the others follow the ODE.

    "all": every step of `span`; FlowGRPO's, where span leaves out the last (its code draws noise there and does not train it).
    "random": `size` steps in a row anywhere within `span`, FlowGRPO-Fast's.
    "sliding": `size` steps in a row, one further every so many rollouts, from the noisiest on and round again: MixGRPO's.

    Args:
        rollout: from 0.
        steps: of the sampler; step 0 starts from noise.
        span: first step and one past the last that may be stochastic.
        size: of the window.
        every: rollouts for which a sliding window stays.
        seed: of the run, for the random window.

    Raises:
        ValueError: a window that does not fit into the span, a span outside the steps, or an unknown window.
    """
    first, end = span
    if not 0 <= first < end <= steps:
        raise ValueError(f"span {first} to {end} does not lie within the {steps} steps")
    if window == "all":
        return range(first, end)
    places = end - first - size + 1
    if size < 1 or places < 1:
        raise ValueError(f"a window of {size} steps does not fit into the {end - first} from {first} to {end}")
    if window == "random":
        start = int(torch.randint(places, (), generator=generator(seed, "window", rollout)))
    elif window == "sliding":
        if every < 1:
            raise ValueError(f"every must be at least 1, got {every}")
        start = rollout // every % places
    else:
        raise ValueError(f"window {window!r} is not one of all, random, sliding")
    return range(first + start, first + start + size)


def check_policy_gradient(*, kind: str, eta: float, clip_range: float, steps: int, trained: range, group: int) -> None:
    """What a policy gradient over stochastic steps can't do.

    Args:
        kind, eta: of `solvers.sde_step`.
        trained: the steps that are trained, of a sampler's `steps`.
        group: images that are compared.

    Raises:
        ValueError: steps without noise or without anything to train, a clip range or group that leaves no gradient.
    """
    if kind not in get_args(Stochastic):
        raise ValueError(f"kind {kind!r} is not one of {', '.join(get_args(Stochastic))}")
    if not eta > 0:
        raise ValueError(f"eta = {eta:g}: a step without noise has no density, so there is nothing to train")
    if kind == "cps" and eta > 1:
        raise ValueError(f"eta = {eta:g}: cps replaces the whole noise at 1, which is its greatest")
    if not trained or trained[0] < 0 or trained[-1] >= steps:
        raise ValueError(f"the trained steps {trained.start} to {trained.stop} are not among the sampler's {steps}")
    if kind == "cps" and trained[-1] == steps - 1:
        raise ValueError("the last step of cps is deterministic and has no density: leave it out of the window")
    if not clip_range > 0:
        raise ValueError(f"clip_range = {clip_range:g}: must be above 0, or the first update ends every gradient")
    if group < 2:
        raise ValueError("a group of one image is its own mean: its advantage is always 0")
