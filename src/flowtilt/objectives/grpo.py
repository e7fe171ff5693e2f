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
    Flow-DPPO (2606.11025): -A rho within a trust region    trust_loss
"""

from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

from flowtilt.flow import per_sample
from flowtilt.methods.grpo import GRPOSettings
from flowtilt.objectives.steps import Gaussians, StepProcess, path_kl, step_kl, stochastic_steps

if TYPE_CHECKING:
    from flowtilt.objectives.batches import TransitionBatch

__all__ = ["GRPO", "grpo_loss", "guard_log_ratio", "guard_loss", "path_kl", "step_kl", "stochastic_steps"]


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


def trust_loss(
    log_prob: Tensor, log_prob_old: Tensor, mean: Tensor, mean_old: Tensor, std: Tensor, advantages: Tensor, trust: float
) -> Tensor:
    """Flow-DPPO's -A rho for each sample, [N], without a clip; 0 where the step's mean has moved too far in the direction of A.

    Too far is `step_kl(mean, mean_old, std)` >= trust where rho > 1 and A > 0, or rho < 1 and A < 0. Unlike rho, that distance
    knows nothing of the noise that was drawn.
    """
    rho = (log_prob - log_prob_old.detach()).exp()
    far = step_kl(mean.detach(), mean_old, std) >= trust
    ahead = torch.where(advantages > 0, rho > 1, (rho < 1) & (advantages < 0))
    return torch.where(far & ahead, 0.0, -advantages * rho)


class GRPO(GRPOSettings, StepProcess):
    """The method with its loss."""

    own_metrics: ClassVar[tuple[str, ...]] = ("ratio_off", "clip_fraction")

    def sample_loss(self, at: Gaussians, batch: "TransitionBatch") -> tuple[Tensor, dict[str, Tensor]]:
        advantages = batch.advantages.clamp(-self.advantage_clip, self.advantage_clip)
        if self.guard:
            log_ratio = guard_log_ratio(batch.x_next, at.mean, at.mean_old, at.std)
            loss = guard_loss(log_ratio, advantages, self.clip_range, batch.sigma_next - batch.sigma)
        elif self.trust is not None:
            log_ratio = at.log_prob - at.log_prob_old
            loss = trust_loss(at.log_prob, at.log_prob_old, at.mean, at.mean_old, at.std, advantages, self.trust)
            stopped = (loss.detach() == 0) & (advantages != 0)
            return loss, {"ratio_off": (log_ratio.detach().exp() - 1).abs(), "clip_fraction": stopped.float()}
        else:
            log_ratio = at.log_prob - at.log_prob_old
            loss = grpo_loss(at.log_prob, at.log_prob_old, advantages, self.clip_range)
        off = (log_ratio.detach().exp() - 1).abs()
        return loss, {"ratio_off": off, "clip_fraction": (off > self.clip_range).float()}
