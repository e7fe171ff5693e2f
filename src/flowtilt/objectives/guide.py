"""The guide's target: a guided velocity, to which the policy is pulled so that it can be sampled without guidance."""

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from flowtilt.models.guidance import guided

if TYPE_CHECKING:
    from flowtilt.methods.guide import GuideSettings
    from flowtilt.models.conditioning import Conditioning
    from flowtilt.objectives.batches import TrainingBatch, TransitionBatch
    from flowtilt.policy.roles import Policy


def guide_pull(
    settings: "GuideSettings",
    policy: "Policy",
    batch: "TrainingBatch | TransitionBatch",
    x_t: Tensor,
    t: Tensor,
    v: Tensor,
    v_old: Tensor | None = None,
) -> Tensor:
    """weight mean (v - v_guided)^2 on the rows that carry the guide, 0 on the others; [N].

    Args:
        x_t, t, v: of all rows; v carries the gradient.
        v_old: of all rows; none asks the collecting policy for those that carry the guide.
    """
    pull = torch.zeros_like(t)
    if batch.guide is None or batch.empty is None or not len(rows := batch.guide.at(t)):
        return pull
    x_t, t, given, old = x_t[rows], t[rows], batch.conditioning.select(rows.cpu()), None
    if settings.guide_of == "old":
        known = v if v_old is None and policy.same_version("old", "current") else v_old
        with torch.no_grad():
            old = policy.velocity("old", x_t, t, given) if known is None else known[rows].detach()
    target = guide_target(settings, policy, x_t, t, old, given, batch.empty)
    return pull.index_add(0, rows, batch.guide.weight * (v[rows] - target).square().flatten(1).mean(1))


@torch.no_grad()
def guide_target(
    settings: "GuideSettings", policy: "Policy", x_t: Tensor, t: Tensor, v_old: Tensor | None, given: "Conditioning", empty: "Conditioning"
) -> Tensor:
    """The guided velocity [n, ...] at x_t [n, ...] and t [n].

    "old": v_old + (s - 1)(v_old - v_ref(x_t, no words)), or the family's own rule: the collecting policy guided away from the base;
    "reference": the frozen base, guided as its family is.

    Args:
        v_old: the collecting policy's velocity; none guides the base.
        given: the captions.
        empty: the caption without words, one row.
    """
    if v_old is None:
        return guided(policy, "reference", given, empty, settings.guide_scale)(x_t, t)
    words = empty.select(torch.zeros(len(x_t), dtype=torch.long))
    return policy.model.guide(v_old, policy.velocity("reference", x_t, t, words), settings.guide_scale)
