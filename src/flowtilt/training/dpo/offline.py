"""Offline DPO: pairs of images from a file, in a seeded order, without replacement within an epoch."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import torch

from flowtilt.distributed.world import World
from flowtilt.errors import UserError
from flowtilt.io.notices import notice
from flowtilt.lora import Lora
from flowtilt.methods.dpo import PLAYGROUND, OfflineDPOSettings
from flowtilt.preferences import Pair, Preferences, read_preferences
from flowtilt.seeding import generator
from flowtilt.training.dpo.latents import Latents
from flowtilt.training.dpo.made import evaluations_of, of_playground
from flowtilt.training.dpo.pairs import Compared, PairLearner
from flowtilt.training.optimizer import RoleOptimizer
from flowtilt.training.parts import Parts
from flowtilt.training.timing import Phases


def begin(parts: Parts) -> "Offline":
    """Offline DPO on a recipe.

    Raises:
        UserError: the pair file can't be used, or has fewer pairs than a step.
    """
    settings = cast(OfflineDPOSettings, parts.recipe.objective)
    place = of_playground(parts) if settings.pairs == PLAYGROUND else Path(settings.pairs)
    found = read_preferences(place)
    number = parts.recipe.rollout.prompts
    if len(found.pairs) < number:
        raise UserError(f"pairs {place}: {found}, but a step takes {number}; add pairs or lower rollout.prompts")
    cost = evaluations_of(place)
    spent = f"; sampling their images took {cost:,} network evaluations, which are not the run's" if cost else ""
    notice(f"pairs {place}: {found}{spent}")
    return Offline(parts, settings, found)


def order(seed: int, position: int, count: int, number: int) -> list[int]:
    """Which of `number` pairs come at `position` … `position + count - 1`: every epoch in an order of its own, each pair once."""
    found: list[int] = []
    while len(found) < count:
        epoch, place = divmod(position + len(found), number)
        shuffled = torch.randperm(number, generator=generator(seed, "pairs", epoch))
        found += shuffled[place : place + count - len(found)].tolist()
    return found


class Offline:
    """A method that reads its images; a step takes `rollout.prompts` pairs."""

    def __init__(self, parts: Parts, settings: OfflineDPOSettings, found: Preferences):
        recipe = parts.recipe
        self._recipe, self._pairs, self._world = recipe, found.pairs, parts.world
        self._policy, self._latents = parts.policy, Latents(parts.policy.model)
        self.learner = PairLearner(recipe, settings, parts.policy, parts.world, parts.micro_batch)
        self.images = recipe.rollout.images()
        """Images that a step reads."""
        self.base_loras: dict[str, Lora] = {}
        """None: the reference is the base."""
        self._agree(parts.world, found)

    @staticmethod
    def _agree(world: World, found: Preferences) -> None:
        first, last = found.pairs[0], found.pairs[-1]
        world.agree({"pairs": len(found.pairs), "first prompt of pairs": first.prompt, "last prompt of pairs": last.prompt})

    @property
    def updates(self) -> dict[str, RoleOptimizer]:
        """By the role whose weights they move."""
        return self.learner.updates

    def state(self) -> dict[str, Any]:
        """Nothing beside weights and optimizers."""
        return {}

    def load(self, state: Mapping[str, Any]) -> None:
        """Nothing to go on with."""

    def close(self) -> None:
        """Nothing goes on in the background."""

    def step(self, step: int, phases: Phases) -> dict[str, float]:
        """Step number `step`, from 1; returns metrics."""
        number, updates = self._recipe.rollout.prompts, self._recipe.optimizer.steps_per_rollout
        places_of_pairs = order(self._recipe.seed, (step - 1) * number, number, len(self._pairs))
        batches: list[tuple[Compared, int]] = []
        for k in range(updates):
            places = range(number * k // updates, number * (k + 1) // updates)
            mine = self._world.share(len(places))
            own = [places[i] for i in mine]
            with phases("sample"):
                batches.append((self._read(step, own, [self._pairs[places_of_pairs[i]] for i in own]), len(places)))
        with phases("train"):
            return self.learner.learn(batches, phases) | {"epoch": step * number / len(self._pairs)}

    def _read(self, step: int, places: list[int], pairs: list[Pair]) -> Compared:
        device = self._policy.model.device
        return Compared(
            chosen=self._latents.stack([(pair.chosen, pair.where) for pair in pairs]),
            rejected=self._latents.stack([(pair.rejected, pair.where) for pair in pairs]),
            weight=torch.tensor([pair.weight for pair in pairs], dtype=torch.float32, device=device),
            # a rank may have no pair of an update
            conditioning=self._policy.model.encode([pair.prompt for pair in pairs] or [""]),
            positions=[(step, place) for place in places],
        )
