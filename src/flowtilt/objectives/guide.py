"""The guide's target: the policy's own velocity, guided away from the reference without words."""

from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from flowtilt.models.conditioning import Conditioning
    from flowtilt.policy.roles import Policy


@torch.no_grad()
def guide_target(policy: "Policy", x_t: Tensor, t: Tensor, v_old: Tensor, empty: "Conditioning", scale: float) -> Tensor:
    """v_old + (scale - 1)(v_old - v_ref(x_t, no words)), [n, ...]: guidance of the collecting policy, whose unguided part stays the base's.

    A policy that is trained to match it needs no guidance when it samples: guidance is distilled into it while it learns.

    Args:
        v_old: the collecting policy's velocity at x_t [n, ...] and t [n].
        empty: the caption without words, one row.
    """
    words = empty.select(torch.zeros(len(x_t), dtype=torch.long))
    return v_old + (scale - 1) * (v_old - policy.velocity("reference", x_t, t, words))
