"""An update on pairs of images, whoever made them."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from flowtilt.config import Recipe
from flowtilt.device.micro_batch import MicroBatch
from flowtilt.distributed.world import World
from flowtilt.methods.dpo import PairSettings
from flowtilt.models.conditioning import Conditioning
from flowtilt.objectives.batches import draw_times
from flowtilt.objectives.dpo import METRICS, NoisedPairs, pair_loss
from flowtilt.policy.roles import Policy
from flowtilt.seeding import generator
from flowtilt.training.learner import Updates, memory_saver
from flowtilt.training.optimizer import RoleOptimizer
from flowtilt.training.timing import Phases


@dataclass(frozen=True)
class Compared:
    """This rank's n pairs of an update.

    Args:
        chosen, rejected: latents [n, ...].
        weight: of each pair's loss, [n].
        conditioning: of their captions.
        positions: what tells each from all others of the run; its times and noise follow from it.
    """

    chosen: Tensor
    rejected: Tensor
    weight: Tensor
    conditioning: Conditioning
    positions: Sequence[tuple[int, ...]]


class PairLearner:
    """Trains a policy on pairs of images, against the frozen reference."""

    def __init__(self, recipe: Recipe, settings: PairSettings, policy: Policy, world: World, micro_batch: MicroBatch):
        self.recipe, self.settings, self.policy, self.micro_batch = recipe, settings, policy, micro_batch
        self.world = world
        self.update = RoleOptimizer(policy, "current", policy.parameters, recipe.optimizer, world)

    @property
    def updates(self) -> dict[str, RoleOptimizer]:
        """By the role whose weights they move."""
        return {"current": self.update}

    def learn(self, batches: Sequence[tuple[Compared, int]], phases: Phases) -> dict[str, float]:
        """One update per batch, this rank's pairs with the number of all ranks' pairs in it; returns mean metrics.

        A batch without pairs is left out: the optimizer would still decay weights and follow its averages.
        """
        made = Updates(self.update, self.policy, self.recipe.ema, self.recipe.ema_every, phases)
        for own, number in batches:
            if not number:
                continue
            rows, of = self._noised(own), number * self.settings.times_per_pair
            sums = self.micro_batch.run_with_backoff(
                "train", lambda size, rows=rows, of=of: self._gradients(rows, of, size), memory_saver(self.recipe, self.policy), self.policy
            )
            made.make(sums, of)
        return made.metrics(len(batches))

    def _noised(self, own: Compared) -> NoisedPairs:
        """Each pair at its noise levels; both images of a row share t and eps, drawn from the pair's own generator."""
        k, model = self.settings.times_per_pair, self.policy.model
        times = torch.empty(len(own.positions), k)
        eps = torch.empty(len(own.positions), k, *model.latent_shape)
        nothing, between = torch.empty(0), partial(model.levels.at, steps=self.recipe.rollout.steps)
        for n, position in enumerate(own.positions):
            rng = generator(self.recipe.seed, "pair", *position)
            times[n] = draw_times(self.settings.times, k, nothing, between, rng)
            torch.randn(eps.shape[1:], generator=rng, out=eps[n])
        pair = torch.arange(len(own.positions)).repeat_interleave(k)
        return NoisedPairs(own.chosen, own.rejected, own.weight, own.conditioning, pair, times.flatten(), eps.flatten(0, 1))

    def _gradients(self, own: NoisedPairs, number: int, size: int) -> dict[str, Tensor]:
        """Puts this rank's part of the gradient of the mean over all `number` rows into .grad; returns sums of the metrics."""
        self.update.clear()
        sums = {name: torch.zeros((), device=own.chosen.device) for name in METRICS}
        for micro in own.micro_batches(size):
            loss, metrics = pair_loss(self.policy, micro, self.settings)
            (loss.sum() / number).backward()
            for name, value in metrics.items():
                sums[name] += value.sum()
        return sums
