"""DiffusionNFT, arXiv 2509.16117: on the forward process, contrast an implicit good and bad velocity.

Shapes   N samples; velocities [N, ...]; r, A and t [N]. Everything fp32, t in (0, 1].
    paper                                          here
    r in [0, 1], optimality probability            optimality(A)
    v+ = (1 - beta) v_old + beta v_theta           v_plus
    v- = (1 + beta) v_old - beta v_theta           v_minus
    |x0_hat - x0|^2 / sg(mean |x0_hat - x0|)       x0_error
    eta_i, the old policy's decay                  old_policy_decay

Where v_theta = v_old the gradient is A_clip * grad(error) and beta cancels: the contrast exists only
through a lagging old policy or several optimizer steps a rollout.
"""

from typing import TYPE_CHECKING, ClassVar

from torch import Tensor

from flowtilt.methods.nft import NFTSettings
from flowtilt.objectives.forward import ForwardProcess, Velocities, old_policy_decay, velocity_kl, x0_error

if TYPE_CHECKING:
    from flowtilt.objectives.batches import TrainingBatch

__all__ = ["NFT", "nft_loss", "old_policy_decay", "optimality", "velocity_kl"]


def optimality(advantages: Tensor, clip: float = 5.0) -> Tensor:
    """r = clip(A / clip, -1, 1) / 2 + 1/2: the probability that an image is a good one, in [0, 1]; [N]."""
    return (advantages / clip).clamp(-1, 1) / 2 + 0.5


def nft_loss(
    v: Tensor, v_old: Tensor, v_target: Tensor, t: Tensor | float, r: Tensor, *, beta: float, clip: float = 5.0, adaptive: bool = True
) -> Tensor:
    """clip [r L(v+) + (1 - r) L(v-)] / beta for each sample, [N]; equation 5 with the adaptive weight.

    Args:
        v: the trained policy's velocity [N, ...]; the only one that carries a gradient.
        v_old: the data-collecting policy's at the same x_t.
        v_target: eps - x0.
        r: optimality probability [N].
        beta: how far v+ and v- stand from v_old, > 0.
        clip: the advantage clip of `optimality`; it restores the advantage's scale.
        adaptive: see `x0_error`.
    """
    v_old = v_old.detach()
    v_plus = (1 - beta) * v_old + beta * v
    v_minus = (1 + beta) * v_old - beta * v
    return clip * (r * x0_error(v_plus, v_target, t, adaptive) + (1 - r) * x0_error(v_minus, v_target, t, adaptive)) / beta


class NFT(NFTSettings, ForwardProcess):
    """The method with its loss.

    `consistency` is our departure, 0 as published. Advantages sum to zero, so nothing holds v_theta to the
    mean of what it samples: around a bad image the loss only pushes away. A constant on every advantage adds
    flow matching on the policy's own images, which changes nothing where v_old is that mean already.
    """

    own_metrics: ClassVar[tuple[str, ...]] = ("deviation",)

    def sample_loss(self, at: Velocities, batch: "TrainingBatch") -> tuple[Tensor, dict[str, Tensor]]:
        r = optimality(batch.advantages + self.consistency, self.advantage_clip)
        loss = nft_loss(at.v, at.v_old, at.v_target, batch.t, r, beta=self.beta, clip=self.advantage_clip, adaptive=self.adaptive)
        return loss, {"deviation": velocity_kl(at.v, at.v_old)}
