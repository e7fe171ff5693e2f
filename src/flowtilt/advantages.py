"""From rewards to advantages: how much better an image is than the others of its prompt.

Axes: N images of a rollout, in groups of one prompt each; R rewards.
"""

from collections.abc import Mapping

import torch
from torch import Tensor


def group_means(values: Tensor, groups: Tensor) -> Tensor:
    """Mean of the numbers among `values` [N] within each image's group, spread back to [N]; `groups` [N] are any integers.

    NaN is a missing value and counts for nothing; a group of nothing but NaN has mean NaN.
    """
    _, index = groups.unique(return_inverse=True)
    known = (~values.isnan()).to(values.dtype)
    totals = values.new_zeros(int(index.max()) + 1 if len(index) else 0)
    return (totals.index_add(0, index, values.nan_to_num(0.0)) / totals.index_add(0, index, known))[index]


def group_stds(values: Tensor, groups: Tensor) -> Tensor:
    """Population standard deviation of `values` [N] within each image's group, spread back to [N]; NaN as in `group_means`."""
    return group_means((values - group_means(values, groups)).square(), groups).sqrt()


def flat_groups(rewards: Tensor, groups: Tensor) -> Tensor:
    """Whether an image's group has rewards that differ by no more than rounding, so that none has an advantage; [N], false for NaN."""
    # float64, or equal rewards differ from their own mean by a rounding that a small std would blow up
    rewards = rewards.double()
    return (group_stds(rewards, groups) <= 1e-12 * group_means(rewards.abs(), groups).clamp_min(1)) & ~rewards.isnan()


def group_advantages(rewards: Tensor, groups: Tensor, scale: str = "global", eps: float = 1e-4) -> Tensor:
    """A_i = (r_i - mean of its group) / (std + eps), [N] fp32; DiffusionNFT's and FlowGRPO's.

    Args:
        rewards: [N]; NaN is a missing value, compared with nobody: its advantage is NaN and its image is left out.
        groups: [N] integers, equal for the images of one prompt.
        scale: "global" divides by the std of all rewards of the rollout (around their common mean, the
            reference's default), "group" by that of the group, "none" leaves the reward's unit.
        eps: added to the std; a group without variance has advantage 0 either way.

    Raises:
        ValueError: shapes differ, a reward is infinite, or an unknown scale.
    """
    if rewards.shape != groups.shape or rewards.ndim != 1:
        raise ValueError(f"rewards and groups must both be [N], got {list(rewards.shape)} and {list(groups.shape)}")
    if rewards.isinf().any():
        raise ValueError("rewards must be finite")
    if scale not in ("global", "group", "none"):
        raise ValueError(f"scale {scale!r} is not 'global', 'group' or 'none'")
    rewards = rewards.double()
    centred = (rewards - group_means(rewards, groups)).masked_fill(flat_groups(rewards, groups), 0.0)
    if scale == "none":
        return centred.float()
    std = group_stds(rewards, groups) if scale == "group" else rewards[~rewards.isnan()].std(correction=0)
    return (centred / (std + eps)).float()


def combine(scores: Mapping[str, Tensor], weights: Mapping[str, float], how: str = "sum", groups: Tensor | None = None) -> Tensor:
    """One reward [N] from several: the weighted sum, of raw scores ("sum", the papers') or of each one normalised.

    "marble" is the sum, too: what is reported; its advantages are found elsewhere (`advantages_by_reward`, training/balance.py).

    "group" is GDPO's (arXiv 2601.05242): each reward less its group's mean, over the group's std; 0 in a group where it is flat.

    "normalized" subtracts a reward's mean over the rollout and divides by its std, so that the reward of
    the largest scale does not decide alone. A NaN is a missing value. A reward that scores no image of a
    group does not apply to its prompt and adds nothing there; where it misses only some of them, those
    have no total (NaN): without the reward's share they would compare as bad. Nor has a group to which nothing applies.

    Args:
        scores: name -> [N].
        weights: name -> weight; a reward of weight 0 is only watched.
        groups: [N] integers, equal for the images of one prompt; none takes every image for itself.

    Raises:
        ValueError: no reward has a weight, one is infinite, no image has a total, or an unknown `how`.
    """
    if how not in ("sum", "normalized", "group", "marble"):
        raise ValueError(f"how {how!r} is not 'sum', 'normalized', 'group' or 'marble'")
    trained = [name for name, weight in weights.items() if weight]
    if not trained:
        raise ValueError("no reward has a weight other than 0")
    groups = torch.arange(len(scores[trained[0]])) if groups is None else groups
    total = torch.zeros(len(groups), dtype=torch.float64)
    judged = torch.zeros(len(groups), dtype=torch.bool)
    for name in trained:
        score = scores[name].double()
        if score.isinf().any():
            raise ValueError(f"reward {name} is infinite for image {int(score.isinf().nonzero()[0])}")
        known = score[~score.isnan()]
        if how == "normalized" and len(known):
            score = (score - known.mean()) / (known.std(correction=0) + 1e-8)
        if how == "group":
            spread = group_stds(score, groups).clamp_min(1e-6)
            score = ((score - group_means(score, groups)) / spread).masked_fill(flat_groups(score, groups), 0.0)
        elsewhere = group_means(score, groups).isnan()
        total += weights[name] * torch.where(elsewhere, torch.zeros_like(score), score)
        judged |= ~elsewhere
    total[~judged] = torch.nan
    if total.isnan().all():
        raise ValueError("no reward gives any image a score")
    return total.float()


def advantages_by_reward(
    scores: Mapping[str, Tensor], weights: Mapping[str, float], total: Tensor, groups: Tensor, scale: str = "global"
) -> Tensor:
    """Advantages of each trained reward by itself, [N, K] fp32, as `group_advantages`; those of a negative weight with the other sign.

    0 where a reward applies to none of a prompt's images; NaN, for all rewards, where an image has no `total`.
    """
    columns = []
    for name in (name for name, weight in weights.items() if weight):
        own = group_advantages(scores[name], groups, scale) * (1 if weights[name] > 0 else -1)
        columns.append(own.masked_fill(group_means(scores[name], groups).isnan(), 0.0))
    return torch.stack(columns, 1).masked_fill(total.isnan()[:, None], torch.nan)


def widest(rewards: Tensor, groups: Tensor, keep: int) -> Tensor:
    """Which `keep` images of each group have the greatest variance of rewards, [N] bool: some of the lowest and the rest of the highest.

    Pro-GRPO's choice (arXiv 2512.15347). A group of fewer images with a reward keeps them all; NaN is never kept.
    """
    kept = torch.zeros(len(rewards), dtype=torch.bool)
    for group in groups.unique():
        rows = ((groups == group) & ~rewards.isnan()).nonzero()[:, 0]
        ordered = rows[rewards[rows].double().sort(stable=True).indices]
        number = min(keep, len(ordered))
        choices = [torch.cat([ordered[:low], ordered[len(ordered) - (number - low) :]]) for low in range(number + 1)]
        best = max(choices, key=lambda chosen: float(rewards[chosen].double().var(correction=0)) if len(chosen) else 0.0)
        kept[best] = True
    return kept
