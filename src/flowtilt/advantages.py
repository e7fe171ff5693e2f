"""From rewards to advantages: how much better an image is than the others of its prompt.

Axes: N images of a rollout, in groups of one prompt each; R rewards.
"""

from collections.abc import Mapping

import torch
from torch import Tensor


def group_means(values: Tensor, groups: Tensor) -> Tensor:
    """Mean of `values` [N] within each image's group, spread back to [N]; `groups` [N] are any integers."""
    _, index = groups.unique(return_inverse=True)
    number = torch.bincount(index).to(values.dtype)
    return (values.new_zeros(len(number)).index_add_(0, index, values) / number)[index]


def group_stds(values: Tensor, groups: Tensor) -> Tensor:
    """Population standard deviation of `values` [N] within each image's group, spread back to [N]."""
    return group_means((values - group_means(values, groups)).square(), groups).sqrt()


def group_advantages(rewards: Tensor, groups: Tensor, scale: str = "global", eps: float = 1e-4) -> Tensor:
    """A_i = (r_i - mean of its group) / (std + eps), [N] fp32; DiffusionNFT's and FlowGRPO's.

    Args:
        rewards: [N], finite.
        groups: [N] integers, equal for the images of one prompt.
        scale: "global" divides by the std of all rewards of the rollout (around their common mean, the
            reference's default), "group" by that of the group.
        eps: added to the std; a group without variance has advantage 0 either way.

    Raises:
        ValueError: shapes differ, a reward is not finite, or an unknown scale.
    """
    if rewards.shape != groups.shape or rewards.ndim != 1:
        raise ValueError(f"rewards and groups must both be [N], got {list(rewards.shape)} and {list(groups.shape)}")
    if not torch.isfinite(rewards).all():
        raise ValueError("rewards must be finite")
    if scale not in ("global", "group"):
        raise ValueError(f"scale {scale!r} is not 'global' or 'group'")
    # float64, or equal rewards differ from their own mean by a rounding that a small std would blow up
    rewards = rewards.double()
    centred = rewards - group_means(rewards, groups)
    std = group_stds(rewards, groups) if scale == "group" else rewards.std(correction=0)
    varies = group_stds(rewards, groups) > 1e-12 * group_means(rewards.abs(), groups).clamp_min(1)
    centred = torch.where(varies, centred, torch.zeros_like(centred))
    return (centred / (std + eps)).float()


def combine(scores: Mapping[str, Tensor], weights: Mapping[str, float], how: str = "sum") -> Tensor:
    """One reward [N] from several: the weighted sum, of raw scores ("sum", the papers') or of each one normalised.

    "normalized" subtracts a reward's mean over the rollout and divides by its std, so that the reward of
    the largest scale does not decide alone. A NaN means "does not apply": it adds nothing.

    Args:
        scores: name -> [N].
        weights: name -> weight; a reward of weight 0 is only watched.

    Raises:
        ValueError: no reward has a weight, one is infinite, an image has no reward that applies, or an unknown `how`.
    """
    if how not in ("sum", "normalized"):
        raise ValueError(f"how {how!r} is not 'sum' or 'normalized'")
    trained = [name for name, weight in weights.items() if weight]
    if not trained:
        raise ValueError("no reward has a weight other than 0")
    for name in trained:
        if scores[name].isinf().any():
            raise ValueError(f"reward {name} is infinite for image {int(scores[name].isinf().nonzero()[0])}")
    applies = torch.stack([~scores[name].isnan() for name in trained]).any(0)
    if not applies.all():
        raise ValueError(f"no reward applies to image {int((~applies).nonzero()[0])}")
    total = torch.zeros(len(scores[trained[0]]), dtype=torch.float64)
    for name in trained:
        score = scores[name].double()
        known = score[~score.isnan()]
        if how == "normalized" and len(known):
            score = (score - known.mean()) / (known.std(correction=0) + 1e-8)
        total += weights[name] * score.nan_to_num(0.0)
    return total.float()
