"""RAM, reinforce adjoint matching, arXiv 2605.10759: regress the velocity on the tilted process's own.

Among all processes the best for E[r] - KL / m tilts the reference's data by exp(m r) and noises them as before. Its
velocity fulfils, with expectations under itself and b any number,

    v = v_ref + m E[(r - b) ((eps - x0) - v) | x_t]

    paper                                     here
    m, one over the KL's temperature          multiplier
    r - b                                     A, `advantage = "none"` in the recipe: in the reward's unit
    v inside the expectation                  v_old, the velocity of the policy that drew x0

Shapes   N samples; velocities [N, ...]; A and t [N]. Everything fp32, t in (0, 1]. The pull to the reference is
inside the target; there is no other.
"""

from typing import TYPE_CHECKING

from torch import Tensor

from flowtilt.flow import per_sample
from flowtilt.methods.ram import RAMSettings
from flowtilt.objectives.forward import ForwardProcess, Velocities, velocity_kl

if TYPE_CHECKING:
    from flowtilt.objectives.batches import TrainingBatch


def ram_loss(v: Tensor, v_old: Tensor, v_ref: Tensor, v_target: Tensor, advantages: Tensor, multiplier: float) -> Tensor:
    """mean (v - sg(v_ref + m A (v_target - v_old)))^2 for each sample, [N].

    Args:
        v: the trained policy's velocity [N, ...]; the only one that carries a gradient.
        v_old, v_ref: the data-collecting and the reference policy's at the same x_t.
        v_target: eps - x0.
        advantages: [N], the reward less its group's mean.
        multiplier: m; the reference is tilted by exp(m r).
    """
    return velocity_kl(v, v_ref + multiplier * per_sample(advantages, v) * (v_target - v_old))


class RAM(RAMSettings, ForwardProcess):
    """The method with its loss."""

    def sample_loss(self, at: Velocities, batch: "TrainingBatch") -> tuple[Tensor, dict[str, Tensor]]:
        assert at.v_ref is not None
        return ram_loss(at.v, at.v_old, at.v_ref, at.v_target, batch.advantages, self.multiplier), {}
