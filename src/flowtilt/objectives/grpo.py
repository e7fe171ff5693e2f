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

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

from flowtilt.flow import per_sample
from flowtilt.seeding import generator
from flowtilt.solvers import log_prob, sde_step

if TYPE_CHECKING:
    from flowtilt.objectives.batches import TransitionBatch
    from flowtilt.policy.roles import Policy


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


@dataclass(frozen=True, kw_only=True)
class GRPO:
    """The method over its settings; fields as in the recipe's `[objective]`."""

    sde: str
    eta: float
    clip_range: float
    kl: float
    window: str
    window_size: int
    window_every: int
    span: tuple[int, int] | None
    advantage_clip: float
    guard: bool

    drops_flat: ClassVar[bool] = True
    """A group whose images score alike is left out: it has no advantage to follow."""

    @property
    def metrics(self) -> tuple[str, ...]:
        """Names of the metrics that `loss` returns."""
        return ("loss", "ratio_off", "clip_fraction", *(("kl",) if self.kl else ()))

    def stochastic(self, rollout: int, steps: int, seed: int) -> range:
        """The steps of rollout number `rollout`, from 0, that draw noise, are kept and trained."""
        span = self.span or (0, max(1, steps - 1))
        return stochastic_steps(
            rollout, steps=steps, span=span, window=self.window, size=self.window_size, every=self.window_every, seed=seed
        )

    def loss(self, policy: "Policy", batch: "TransitionBatch") -> tuple[Tensor, dict[str, Tensor]]:
        """Loss [N] of a micro-batch of steps and its metrics [N], detached."""
        mean, std = self._step(batch, batch.velocity(policy, "current"))
        log_new = log_prob(batch.x_next, mean, std)
        same = policy.equal("old", "current")
        # the stored ones went through other batches: with equal weights the ratio is 1, not nearly 1
        log_old, mean_old = (log_new.detach(), mean.detach()) if same else (batch.log_prob, batch.mean)
        advantages = batch.advantages.clamp(-self.advantage_clip, self.advantage_clip)
        if self.guard:
            log_ratio = guard_log_ratio(batch.x_next, mean, mean_old, std)
            loss = guard_loss(log_ratio, advantages, self.clip_range, batch.sigma_next - batch.sigma)
        else:
            log_ratio = log_new - log_old
            loss = grpo_loss(log_new, log_old, advantages, self.clip_range)
        off = (log_ratio.detach().exp() - 1).abs()
        metrics = {"ratio_off": off, "clip_fraction": (off > self.clip_range).float()}
        if self.kl:
            with torch.no_grad():
                mean_ref, _ = self._step(batch, batch.velocity(policy, "reference"))
            metrics["kl"] = path_kl(mean, mean_ref, std, batch.sigma_next - batch.sigma)
            loss = loss + self.kl * metrics["kl"]
        return loss, {name: value.detach() for name, value in {"loss": loss, **metrics}.items()}

    def _step(self, batch: "TransitionBatch", v: Tensor) -> tuple[Tensor, Tensor]:
        nothing = torch.zeros_like(batch.x)
        _, mean, std = sde_step(batch.x, v, batch.sigma, batch.sigma_next, nothing, self.sde, self.eta, batch.sigma_max)
        return mean, std

    def after_rollout(self, policy: "Policy", optimizer_step: int) -> None:
        """The next rollout is drawn by the trained policy."""
        policy.average("old", 0.0)
