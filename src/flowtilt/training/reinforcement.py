"""A step of reinforcement: a rollout, and what is learnt from it."""

from collections.abc import Mapping
from typing import Any, Protocol

from flowtilt.build import build_objective
from flowtilt.lora import Lora
from flowtilt.methods.base import trained_rewards
from flowtilt.objectives import RolloutSpec
from flowtilt.prompts.teaching import TeachingPrompts
from flowtilt.training.balance import Balance
from flowtilt.training.learner import Learner, memory_saver
from flowtilt.training.optimizer import RoleOptimizer
from flowtilt.training.parts import Parts
from flowtilt.training.rollouts import Rollouts
from flowtilt.training.scored import ScoredRollout
from flowtilt.training.timing import Phases


class RolloutLearner(Protocol):
    """What learns from scored rollouts."""

    @property
    def objective(self) -> RolloutSpec:
        """What the rollouts are for."""
        ...

    @property
    def updates(self) -> dict[str, RoleOptimizer]:
        """By the role whose weights they move."""
        ...

    def learn(self, step: int, rollout: ScoredRollout, phases: Phases) -> dict[str, float]:
        """All optimizer steps of one rollout; returns mean metrics."""
        ...

    def state(self) -> dict[str, Any]:
        """What a checkpoint needs beside weights and optimizers, as JSON."""
        ...

    def load(self, state: Mapping[str, Any]) -> None:
        """Goes on from a checkpoint's `state`."""
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
        balance=Balance(trained_rewards(recipe)) if recipe.combine == "marble" else None,
    )
    return Reinforcement(parts, learner)


class Reinforcement:
    """Rewards that tilt a policy, by any method that learns from scored images."""

    def __init__(self, parts: Parts, learner: RolloutLearner, base_loras: Mapping[str, Lora] | None = None):
        rollout = parts.recipe.rollout
        recipe, walk = parts.recipe, parts.walk
        self._walk, self._prompts = walk, rollout.prompts
        self._teaching: TeachingPrompts | None = None
        if recipe.tags == "auto" or recipe.prompts_by == "variance":
            turns = None if recipe.tags == "auto" else walk.turns
            self._teaching = TeachingPrompts(walk.prompts, recipe.seed, turns, recipe.prompts_by == "variance")
        self.images = rollout.images()
        """Images that a step samples."""
        self.learner = learner
        self.base_loras = base_loras or {}
        """The LoRA that a further role was put on, by role."""
        self.rollouts = Rollouts(parts.recipe, parts.policy, learner.objective, parts.rewards, parts.world, parts.micro_batch, parts.show)

    @property
    def updates(self) -> dict[str, RoleOptimizer]:
        """By the role whose weights they move."""
        return self.learner.updates

    def step(self, step: int, phases: Phases) -> dict[str, float]:
        """Rollout number `step`, from 1, and its updates; returns metrics."""
        number, teaching = self._prompts, self._teaching
        prompts = teaching.take(step, number) if teaching else self._walk.take((step - 1) * number, number)
        rollout, metrics = self.rollouts.sample(step, prompts, phases)
        if teaching and rollout.rewards is not None:
            teaching.learn(rollout.rewards)
        with phases("train"):
            return metrics | self.learner.learn(step, rollout, phases)

    def state(self) -> dict[str, Any]:
        """What the choice of prompts and the weighing of rewards have learnt."""
        return self.learner.state() | ({"prompts": self._teaching.state()} if self._teaching else {})

    def load(self, state: Mapping[str, Any]) -> None:
        """Goes on from a checkpoint's `state`."""
        self.learner.load(state)
        if self._teaching and "prompts" in state:
            self._teaching.load(state["prompts"])
