"""A step of reinforcement: a rollout, and what is learnt from it."""

from collections.abc import Mapping

from flowtilt.config import Recipe
from flowtilt.device.micro_batch import MicroBatch
from flowtilt.distributed.world import World
from flowtilt.policy.roles import Policy
from flowtilt.prompts import PromptWalk
from flowtilt.rewards import Reward
from flowtilt.training.learner import Learner
from flowtilt.training.optimizer import Update
from flowtilt.training.rollouts import Rollouts
from flowtilt.training.rtdmd.reinforce import Hybrid
from flowtilt.training.timing import Phases


class Reinforcement:
    """Rewards that tilt a policy, by any method that learns from scored images."""

    def __init__(
        self,
        recipe: Recipe,
        policy: Policy,
        walk: PromptWalk,
        rewards: Mapping[str, Reward],
        learner: Learner | Hybrid,
        world: World,
        micro_batch: MicroBatch,
    ):
        self.walk, self._prompts = walk, recipe.rollout.prompts
        self.images = recipe.rollout.images()
        """Images that a step draws."""
        self.learner = learner
        self.rollouts = Rollouts(recipe, policy, learner.objective, rewards, world, micro_batch)

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
