"""DiffusionNFT, arXiv 2509.16117: on the forward process, contrast an implicit good and bad velocity.

Shapes   N samples; velocities [N, ...]; r, A and t [N]. Everything fp32, t in (0, 1].
    paper                                          here
    r in [0, 1], optimality probability            optimality(A)
    v+ = (1 - beta) v_old + beta v_theta           v_plus
    v- = (1 + beta) v_old - beta v_theta           v_minus
    |x0_hat - x0|^2 / sg(mean |x0_hat - x0|)       _error, since x0_hat - x0 = -t (v - v_target)
    eta_i, the old policy's decay                  old_policy_decay

Where v_theta = v_old the gradient is A_clip * grad(error) and beta cancels: the contrast exists only
through a lagging old policy or several optimizer steps a rollout.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from flowtilt.flow import add_noise, per_sample, velocity_target

if TYPE_CHECKING:
    from flowtilt.policy import Policy
    from flowtilt.rollout import TrainingBatch

LEAST_ERROR = 1e-5
"""The self-normalising weight is never smaller, in units of the latents."""


def optimality(advantages: Tensor, clip: float = 5.0) -> Tensor:
    """r = clip(A / clip, -1, 1) / 2 + 1/2: the probability that an image is a good one, in [0, 1]; [N]."""
    return (advantages / clip).clamp(-1, 1) / 2 + 0.5


def nft_loss(v: Tensor, v_old: Tensor, v_target: Tensor, t: Tensor | float, r: Tensor, *, beta: float, clip: float = 5.0) -> Tensor:
    """clip [r L(v+) + (1 - r) L(v-)] / beta for each sample, [N]; equation 5 with the adaptive weight.

    Args:
        v: the trained policy's velocity [N, ...]; the only one that carries a gradient.
        v_old: the data-collecting policy's at the same x_t.
        v_target: eps - x0.
        r: optimality probability [N].
        beta: how far v+ and v- stand from v_old, > 0.
        clip: the advantage clip of `optimality`; it restores the advantage's scale.
    """
    v_old = v_old.detach()
    v_plus = (1 - beta) * v_old + beta * v
    v_minus = (1 + beta) * v_old - beta * v
    return clip * (r * _error(v_plus - v_target, t) + (1 - r) * _error(v_minus - v_target, t)) / beta


def _error(difference: Tensor, t: Tensor | float) -> Tensor:
    """mean (x0_hat - x0)^2 / w with w = max(mean |x0_hat - x0|, 1e-5) without gradient, [N]."""
    off = (per_sample(t, difference) * difference).flatten(1)
    # the paper's code takes the mean in float64; over a latent's values fp32 differs in the last bit only
    weight = off.detach().abs().mean(1, dtype=torch.float64).clamp_min(LEAST_ERROR).float()
    return off.square().mean(1) / weight


def velocity_kl(v: Tensor, v_ref: Tensor) -> Tensor:
    """mean (v - v_ref)^2 for each sample, [N]: the pull to the reference."""
    return (v - v_ref.detach()).square().flatten(1).mean(1)


def old_policy_decay(schedule: str, optimizer_step: int) -> float:
    """d in old <- d old + (1 - d) current, after a rollout's optimizer steps; s counts them from the run's start.

    "copy": 0. "linear": min(0.001 s, 0.5). "delayed": 0 before s = 75, then min(0.0075 (s - 75), 0.999).

    Raises:
        ValueError: an unknown schedule.
    """
    match schedule:
        case "copy":
            return 0.0
        case "linear":
            return min(0.001 * optimizer_step, 0.5)
        case "delayed":
            return 0.0 if optimizer_step < 75 else min(0.0075 * (optimizer_step - 75), 0.999)
    raise ValueError(f"schedule {schedule!r} is not one of copy, linear, delayed")


@dataclass(frozen=True)
class NFT:
    """The method over its settings; fields as in the recipe's `[objective]`.

    `consistency` is our departure, 0 as published. Advantages sum to zero, so nothing holds v_theta to the
    mean of what it draws: around a bad image the loss only pushes away. A constant on every advantage adds
    flow matching on the policy's own images, which changes nothing where v_old is that mean already.
    """

    beta: float
    advantage_clip: float
    kl: float
    old_policy: str
    consistency: float = 0.0

    @property
    def metrics(self) -> tuple[str, ...]:
        """Names of the metrics that `loss` returns."""
        return ("loss", "deviation", "kl") if self.kl else ("loss", "deviation")

    def loss(self, policy: "Policy", batch: "TrainingBatch") -> tuple[Tensor, dict[str, Tensor]]:
        """Loss [N] of a micro-batch and its metrics [N], detached."""
        x_t = add_noise(batch.x0, batch.eps, batch.t)
        v = policy.velocity("current", x_t, batch.t, batch.conditioning)
        with torch.no_grad():
            same = policy.equal("old", "current")
            v_old = v.detach() if same else policy.velocity("old", x_t, batch.t, batch.conditioning)
        r = optimality(batch.advantages + self.consistency, self.advantage_clip)
        loss = nft_loss(v, v_old, velocity_target(batch.x0, batch.eps), batch.t, r, beta=self.beta, clip=self.advantage_clip)
        metrics = {"deviation": velocity_kl(v.detach(), v_old)}
        if self.kl:
            with torch.no_grad():
                v_ref = policy.velocity("reference", x_t, batch.t, batch.conditioning)
            pull = velocity_kl(v, v_ref)
            metrics["kl"] = pull.detach()
            loss = loss + self.kl * pull
        return loss, {"loss": loss.detach(), **metrics}

    def after_rollout(self, policy: "Policy", optimizer_step: int) -> None:
        """Moves the data-collecting policy toward the trained one."""
        policy.average("old", old_policy_decay(self.old_policy, optimizer_step))
