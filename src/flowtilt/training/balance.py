"""Weights of several rewards found from their gradients (MARBLE, arXiv 2605.06507), which move while training.

A reward's own gradient is G_k = gradient(A_k) - gradient(0): the part of the loss's gradient that its advantages A_k make. The
loss's gradient is affine in the advantages, so the mixture sum_k c_k A_k has the gradient sum_k c_k G_k and one backward pass
serves all K. With c_k in proportion to alpha_k / |G_k| it points along sum_k alpha_k G_k / |G_k|, MARBLE's direction.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from flowtilt.methods.base import BALANCED_EVERY
from flowtilt.objectives.marble import common_descent
from flowtilt.training.scored import ScoredRollout

NEW = 0.3
"""Share of a new solution in the average, as published."""
LEAST_NORM = 1e-12
"""A gradient no longer than this has no direction."""


class Balance:
    """What each reward weighs in the advantages.

    Args:
        names: of the K rewards.
    """

    def __init__(self, names: Sequence[str]):
        self.names = list(names)
        self._alpha = torch.full((len(names),), 1 / len(names), dtype=torch.float64)
        self._norms = torch.ones(len(names), dtype=torch.float64)
        self._next = 0
        self._solved = False
        self._least_cosine = 1.0

    def due(self, updates: int) -> bool:
        """Whether a solution is due after so many updates."""
        return updates >= self._next

    def solve(self, updates: int, gradient: Callable[[Tensor], Sequence[Tensor]]) -> None:
        """Finds the weights anew, of which the average follows.

        Args:
            updates: made so far.
            gradient: the loss's gradient over all ranks, where the advantages are those of the rewards times weights [K].
        """
        self._next = updates + BALANCED_EVERY
        units = torch.eye(len(self.names), dtype=torch.float64)
        rest = gradient(torch.zeros_like(units[0]))
        own = [torch.cat([(part - base).flatten() for part, base in zip(gradient(unit), rest, strict=True)]).double() for unit in units]
        norms = torch.stack([part.norm() for part in own]).cpu()
        usable = (norms.isfinite() & (norms > LEAST_NORM)).nonzero()[:, 0]
        if not len(usable):
            return
        products = torch.stack([torch.stack([(own[i] @ own[j]).cpu() for j in usable]) for i in usable])
        cosines = products / (norms[usable][:, None] * norms[usable])
        alpha = torch.zeros_like(self._alpha)
        alpha[usable] = common_descent(cosines)
        new = NEW if self._solved else 1.0
        self._alpha = (1 - new) * self._alpha + new * alpha
        # a reward without a gradient keeps the length that it had
        self._norms[usable] = (1 - new) * self._norms[usable] + new * norms[usable]
        self._solved, self._least_cosine = True, float(cosines.min())

    def weights(self) -> Tensor:
        """c [K] fp64, of sum 1."""
        share = self._alpha / self._norms
        return share / share.sum()

    def mixed(self, rollout: ScoredRollout, weights: Tensor) -> ScoredRollout:
        """A rollout whose advantages are those of the rewards times `weights` [K]."""
        assert rollout.by_reward is not None
        advantages = (rollout.by_reward.double() @ weights).float()
        here = advantages[rollout.indices.start : rollout.indices.stop].to(rollout.x0.device)
        return replace(rollout, advantages=here, all_advantages=advantages)

    def metrics(self) -> dict[str, float]:
        """alpha and |G| of each reward, and how much two of them oppose each other: the least cosine of the last solution."""
        found = {f"marble/alpha/{name}": float(value) for name, value in zip(self.names, self._alpha, strict=True)}
        found |= {f"marble/norm/{name}": float(value) for name, value in zip(self.names, self._norms, strict=True)}
        return found | {"marble/least_cosine": self._least_cosine}

    def state(self) -> dict[str, Any]:
        """For a checkpoint."""
        return {
            "alpha": self._alpha.tolist(),
            "norms": self._norms.tolist(),
            "next": self._next,
            "solved": self._solved,
            "least_cosine": self._least_cosine,
        }

    def load(self, state: Mapping[str, Any]) -> None:
        """Goes on from a checkpoint's `state`."""
        self._alpha, self._norms = (torch.tensor(state[name], dtype=torch.float64) for name in ("alpha", "norms"))
        self._next, self._solved, self._least_cosine = state["next"], state["solved"], state["least_cosine"]
