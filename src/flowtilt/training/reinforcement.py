"""A step of reinforcement: a rollout, and what is learnt from it.

With `rollout.lag` = L, step s samples rollout s + L with the policy after s - 1 rollouts, and then trains on rollout s, which the policy
after s - 1 - L rollouts has sampled: always, however fast its rewards are there. That policy's weights are kept until then. A
checkpoint has the L kept policies and no images: who goes on samples again what was under way, from the same noise to the same bits.
"""

from collections.abc import Mapping
from typing import Any, Protocol

from flowtilt.build import build_objective
from flowtilt.lora import Lora
from flowtilt.methods.base import trained_rewards
from flowtilt.objectives import RolloutSpec
from flowtilt.prompts import Prompt
from flowtilt.prompts.teaching import TeachingPrompts
from flowtilt.training.balance import Balance
from flowtilt.training.learner import Learner, memory_saver
from flowtilt.training.optimizer import RoleOptimizer
from flowtilt.training.parts import Parts
from flowtilt.training.rollouts import Rollouts, SampledRollout
from flowtilt.training.scored import ScoredRollout
from flowtilt.training.timing import Phases

KEPT = "old_"
"""Begins the role of what the old policy was after so many rollouts."""


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


class Stateless:
    """A learner of which weights and optimizers are all there is."""

    def state(self) -> dict[str, Any]:
        """Nothing."""
        return {}

    def load(self, state: Mapping[str, Any]) -> None:
        """Nothing to take back."""


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
        ema_every=recipe.ema_every,
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
        self._policy, self._lag, self._last = parts.policy, rollout.lag, recipe.rollouts
        self._drawn: dict[int, SampledRollout] = {}
        self.rollouts = Rollouts(
            parts.recipe, parts.policy, learner.objective, parts.rewards, parts.world, parts.micro_batch, parts.show, parts.log
        )

    @property
    def updates(self) -> dict[str, RoleOptimizer]:
        """By the role whose weights they move."""
        return self.learner.updates

    def step(self, step: int, phases: Phases) -> dict[str, float]:
        """Rollout number `step`, from 1, and its updates; returns metrics."""
        self._draw_ahead(step, phases)
        rollout, metrics = self.rollouts.score(self._drawn.pop(step), phases)
        if self._teaching and rollout.rewards is not None:
            self._teaching.learn(step, rollout.rewards)
        sampled_by = self._role(step)
        with self._policy.read_as("old", sampled_by), phases("train"):
            metrics |= self.learner.learn(step, rollout, phases)
        if sampled_by not in {self._role(later) for later in range(step + 1, step + self._lag + 2)}:
            self._policy.forget(sampled_by)
        return metrics

    def _draw_ahead(self, step: int, phases: Phases) -> None:
        """Samples what is not under way yet of the rollouts from `step` to `step + lag`, the run's last one at most."""
        newest = self._role(step + self._lag)
        if newest not in self._policy.roles:
            self._policy.keep("old", newest)
        for number in range(step, step + self._lag + 1):
            # chosen on time even where a longer run samples it later: what is learnt until then must not change the choice
            prompts = self._chosen(number)
            if number not in self._drawn and number <= max(step, self._last):
                self._drawn[number] = self.rollouts.begin(number, prompts, phases, self._role(number))

    def _chosen(self, number: int) -> list[Prompt]:
        count = self._prompts
        return self._teaching.take(number, count) if self._teaching else self._walk.take((number - 1) * count, count)

    def _role(self, number: int) -> str:
        """The policy that samples rollout `number`: "old" itself, or what it was after so many rollouts."""
        return f"{KEPT}{max(0, number - 1 - self._lag)}" if self._lag else "old"

    def close(self) -> None:
        """Lets go of the rollouts whose scores are not there yet; the next step samples them again."""
        for drawn in self._drawn.values():
            drawn.scoring.close()
        self._drawn.clear()

    def state(self) -> dict[str, Any]:
        """What the choice of prompts and the weighing of rewards have learnt, and which policies are kept."""
        kept = [role for role in self._policy.roles if role.startswith(KEPT)]
        learnt = self.learner.state() | ({"prompts": self._teaching.state()} if self._teaching else {})
        return learnt | ({"kept": kept} if kept else {})

    def load(self, state: Mapping[str, Any]) -> None:
        """Goes on from a checkpoint's `state`; the weights of the kept policies come with the others."""
        self.learner.load(state)
        if self._teaching and "prompts" in state:
            self._teaching.load(state["prompts"])
        for role in state.get("kept", []):
            self._policy.keep("old", role)
