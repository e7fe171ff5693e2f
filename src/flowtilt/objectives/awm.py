"""AWM, advantage weighted matching, arXiv 2509.25050: PPO's loss with the flow-matching error for a likelihood.

Shapes   N samples; velocities [N, ...]; A and t [N]. Everything fp32, t in (0, 1].
    paper and its code                                 here
    l = mean (v - v_target)^2                          matching_log_prob, weighting "uniform": log p = -l
    log p = -(t / p) ((l + e)^p - e^p), p = 1/4        weighting "ghuber", which the code's recipes have
    max(-A rho, -A clip(rho, 1 - c, 1 + c))            awm_loss, with rho = p_theta / p_old
    beta mean (v - v_ref)^2                            kl
    mean (v - v_ema)^2                                 anchor, to the old policy

Departure: the code collects with the trained policy (so rho is 1 at each update, c = 1 never acts) and keeps an
average of it for the anchor. Here the policy that collects is that average, and rho and anchor look at the same one.
"""

from typing import TYPE_CHECKING, ClassVar

from torch import Tensor

from flowtilt.flow import per_sample
from flowtilt.methods.awm import AWMSettings
from flowtilt.objectives.forward import ForwardProcess, Velocities, velocity_kl
from flowtilt.objectives.grpo import grpo_loss

if TYPE_CHECKING:
    from flowtilt.objectives.batches import TrainingBatch

POWER = 0.25
"""p of the generalised Huber weighting."""
LEAST = 1e-10
"""e: keeps its gradient finite at l = 0."""


def matching_log_prob(v: Tensor, v_target: Tensor, t: Tensor | float, weighting: str = "ghuber") -> Tensor:
    """What stands for log p(x0) at one x_t, [N], at most 0.

    Raises:
        ValueError: an unknown weighting.
    """
    error = (v - v_target).square().flatten(1).mean(1)
    match weighting:
        case "uniform":
            return -error
        case "ghuber":
            return -per_sample(t, error) / POWER * ((error + LEAST) ** POWER - LEAST**POWER)
    raise ValueError(f"weighting {weighting!r} is not 'uniform' or 'ghuber'")


def awm_loss(
    v: Tensor,
    v_old: Tensor,
    v_target: Tensor,
    t: Tensor | float,
    advantages: Tensor,
    *,
    clip_range: float = 1.0,
    weighting: str = "ghuber",
) -> Tensor:
    """The clipped policy gradient for each sample, [N].

    Args:
        v: the trained policy's velocity [N, ...]; the only one that carries a gradient.
        v_old: the data-collecting policy's at the same x_t.
        v_target: eps - x0.
        advantages: [N], within [-1, 1] in the paper.
    """
    log_prob, log_prob_old = (matching_log_prob(each, v_target, t, weighting) for each in (v, v_old))
    return grpo_loss(log_prob, log_prob_old, advantages, clip_range)


class AWM(AWMSettings, ForwardProcess):
    """The method with its loss. `consistency` as in NFT, 0 there."""

    own_metrics: ClassVar[tuple[str, ...]] = ("anchor",)

    def sample_loss(self, at: Velocities, batch: "TrainingBatch") -> tuple[Tensor, dict[str, Tensor]]:
        advantages = ((batch.advantages + self.consistency) / self.advantage_clip).clamp(-1, 1)
        settings = {"clip_range": self.clip_range, "weighting": self.weighting}
        loss = awm_loss(at.v, at.v_old, at.v_target, batch.t, advantages, **settings)
        anchor = velocity_kl(at.v, at.v_old)
        return loss + self.anchor * anchor, {"anchor": anchor}
