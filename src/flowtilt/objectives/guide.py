"""The guide's target: a guided velocity, to which the policy is pulled so that it can be sampled without guidance."""

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from flowtilt.models.guidance import guided

if TYPE_CHECKING:
    from flowtilt.methods.guide import GuideSettings
    from flowtilt.models.conditioning import Conditioning
    from flowtilt.policy.roles import Policy


@torch.no_grad()
def guide_target(
    settings: "GuideSettings", policy: "Policy", x_t: Tensor, t: Tensor, v_old: Tensor, given: "Conditioning", empty: "Conditioning"
) -> Tensor:
    """The guided velocity [n, ...] at x_t [n, ...] and t [n].

    "old": v_old + (s - 1)(v_old - v_ref(x_t, no words)), or the family's own rule: the collecting policy guided away from the base;
    "reference": the frozen base, guided as its family is.

    Args:
        v_old: the collecting policy's velocity.
        given: the captions.
        empty: the caption without words, one row.
    """
    if settings.guide_of == "reference":
        return guided(policy, "reference", given, empty, settings.guide_scale)(x_t, t)
    words = empty.select(torch.zeros(len(x_t), dtype=torch.long))
    return policy.model.guide(v_old, policy.velocity("reference", x_t, t, words), settings.guide_scale)
