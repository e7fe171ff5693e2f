"""A step of reinforcement: a rollout, and what is learnt from it."""

from collections.abc import Mapping
from typing import Protocol

from flowtilt.build import build_objective
from flowtilt.lora import Lora
from flowtilt.objectives import Collecting
from flowtilt.training.learner import Learner, Scored, memory_saver
from flowtilt.training.optimizer import Update
from flowtilt.training.parts import Parts
from flowtilt.training.rollouts import Rollouts
from flowtilt.training.timing import Phases


class RolloutLearner(Protocol):
    """What learns from scored rollouts."""

    @property
    def objective(self) -> Collecting:
        """What the rollouts are for."""
        ...

    @property
    def updates(self) -> dict[str, Update]:
        """By the role whose weights they move."""
        ...

    def learn(self, step: int, rollout: Scored, phases: Phases) -> dict[str, float]:
        """All optimizer steps of one rollout; returns mean metrics."""
        ...


def by_objective(parts: Parts) -> "Reinforcement":
    """The method of a recipe whose `[objective]` has a loss."""
    recipe = parts.recipe
    learner = Learner(
        parts.policy,
        build_objective(recipe.objective),
        recipe.optimizer,
        recipe.rollout,
        seed=recipe.seed,
        ema=recipe.ema,
        world=parts.world,
        micro_batch=parts.micro_batch,
        save_memory=memory_saver(recipe, parts.policy),
    )
    return Reinforcement(parts, learner)


class Reinforcement:
    """Rewards that tilt a policy, by any method that learns from scored images."""

    def __init__(self, parts: Parts, learner: RolloutLearner, base_loras: Mapping[str, Lora] | None = None):
        rollout = parts.recipe.rollout
        self.walk, self._prompts = parts.walk, rollout.prompts
        self.images = rollout.images()
        """Images that a step samples."""
        self.learner = learner
        self.base_loras = base_loras or {}
        """The LoRA that a further role was put on, by role."""
        self.rollouts = Rollouts(parts.recipe, parts.policy, learner.objective, parts.rewards, parts.world, parts.micro_batch, parts.show)

    @property
    def updates(self) -> dict[str, Update]:
        """By the role whose weights they move."""
        return self.learner.updates

    def step(self, step: int, phases: Phases) -> dict[str, float]:
        """Rollout number `step`, from 1, and its updates; returns metrics."""
        drawn = self.walk.draw((step - 1) * self._prompts, self._prompts)
        rollout, metrics = self.rollouts.draw(step, drawn, phases)
        with phases("train"):
            return metrics | self.learner.learn(step, rollout, phases)
