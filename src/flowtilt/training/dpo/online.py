"""Online DPO: the best against the worst image of each prompt of a rollout, ties left out."""

from dataclasses import dataclass
from typing import ClassVar, cast

import torch
from torch import Tensor

from flowtilt.config import RolloutSettings
from flowtilt.methods.dpo import OnlineDPOSettings
from flowtilt.objectives import PlainAdvantages
from flowtilt.seeding import generator
from flowtilt.training.dpo.pairs import Compared, PairLearner
from flowtilt.training.optimizer import RoleOptimizer
from flowtilt.training.parts import Parts
from flowtilt.training.reinforcement import Reinforcement, Stateless
from flowtilt.training.scored import ScoredRollout
from flowtilt.training.timing import Phases


def begin(parts: Parts) -> Reinforcement:
    """Online DPO on a recipe."""
    return Reinforcement(parts, BestAndWorst(parts))


@dataclass(frozen=True)
class CleanImages(PlainAdvantages):
    """What its rollouts are: clean samples, of prompts whose images differ in their reward."""

    drops_flat: ClassVar[bool] = True
    """A prompt whose images score alike has no best one."""

    def keeps(self, rollout: int, settings: RolloutSettings, seed: int) -> None:
        """No steps."""


def best_and_worst(advantages: Tensor, per_prompt: int) -> Tensor:
    """The indices [P, 2] of the best and the worst image of each prompt that has a best one, first come first served.

    Args:
        advantages: of all images, a prompt's beside each other; NaN where an image has none.
        per_prompt: images of each prompt.
    """
    groups = advantages.view(-1, per_prompt)
    missing = groups.isnan()
    best = groups.masked_fill(missing, -torch.inf).argmax(1)
    worst = groups.masked_fill(missing, torch.inf).argmin(1)
    rows = torch.arange(len(groups))
    there = groups[rows, best] > groups[rows, worst]  # false for a tie and for a prompt without scores
    return (torch.stack([best, worst], 1) + per_prompt * rows[:, None])[there]


class BestAndWorst(Stateless):
    """The learner. A pair is trained on the rank that has its best image; the worst one's latents travel there."""

    def __init__(self, parts: Parts):
        recipe = parts.recipe
        self.objective = CleanImages()
        self.pairs = PairLearner(recipe, cast(OnlineDPOSettings, recipe.objective), parts.policy, parts.world, parts.micro_batch)
        self._recipe, self._world = recipe, parts.world

    @property
    def updates(self) -> dict[str, RoleOptimizer]:
        """By the role whose weights they move."""
        return self.pairs.updates

    def learn(self, step: int, rollout: ScoredRollout, phases: Phases) -> dict[str, float]:
        """All optimizer steps of one rollout; the next is sampled by the trained policy."""
        seed, updates = self._recipe.seed, self._recipe.optimizer.steps_per_rollout
        chosen = best_and_worst(rollout.all_advantages.where(rollout.kept, torch.nan), self._recipe.rollout.images_per_prompt)
        with phases("sync"):
            worst = self._everywhere(rollout, chosen[:, 1])
        order = torch.randperm(len(chosen), generator=generator(seed, "order", step))
        shares = [order[len(order) * k // updates : len(order) * (k + 1) // updates] for k in range(updates)]
        metrics = self.pairs.learn([(self._own(step, rollout, chosen, worst, share), len(share)) for share in shares], phases)
        self.pairs.policy.average("old", 0.0)
        return {**metrics, "pairs": float(len(chosen))}

    def _everywhere(self, rollout: ScoredRollout, images: Tensor) -> Tensor:
        """Latents [P, ...] of those images on every rank: a sum to which one rank gives an image and the others zeros."""
        found = rollout.x0.new_zeros(len(images), *rollout.x0.shape[1:])
        for k, image in enumerate(images.tolist()):
            if image in rollout.indices:
                found[k] = rollout.x0[image - rollout.indices.start]
        if len(found):
            self._world.sum_([found])
        return found

    def _own(self, step: int, rollout: ScoredRollout, chosen: Tensor, worst: Tensor, share: Tensor) -> Compared:
        """Of an update's pairs `share`, those whose best image is this rank's."""
        own = torch.tensor([k for k in share.tolist() if int(chosen[k, 0]) in rollout.indices], dtype=torch.long)
        image = chosen[own, 0] - rollout.indices.start
        x0 = rollout.x0
        per_prompt = self._recipe.rollout.images_per_prompt
        positions = [(step, int(k) // per_prompt) for k in chosen[own, 0]]
        weight = torch.ones(len(own), device=x0.device)
        return Compared(x0[image.to(x0.device)], worst[own.to(x0.device)], weight, rollout.conditioning.select(image), positions)
