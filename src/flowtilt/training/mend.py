"""MEND at work (arXiv 2610.05954): samples are improved along a reward's gradient, then the policy regresses on them."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, cast

import torch
from torch import Tensor

from flowtilt.config import RolloutSettings
from flowtilt.device.micro_batch import parts
from flowtilt.methods.mend import MendSettings
from flowtilt.objectives import PlainAdvantages
from flowtilt.objectives.mend import accepted, adapted_tau, ceilings, mend_loss, moved, raised_floor, row_weights
from flowtilt.sampling.trajectory import KeptSteps
from flowtilt.training.followed import Followed
from flowtilt.training.learner import Updates, memory_saver, shares
from flowtilt.training.optimizer import RoleOptimizer
from flowtilt.training.parts import Parts
from flowtilt.training.reinforcement import Reinforcement
from flowtilt.training.scored import ScoredRollout
from flowtilt.training.timing import Phases


@dataclass(frozen=True)
class NearLevel(PlainAdvantages):
    """What its rollouts are: the ODE's own, of which the state before step `step` is kept."""

    drops_flat: ClassVar[bool] = False
    step: int

    def keeps(self, rollout: int, settings: RolloutSettings, seed: int) -> KeptSteps:
        """The step from that state; cps without noise is Euler's step."""
        return KeptSteps(range(self.step, self.step + 1), "cps", 0.0)


@dataclass(frozen=True)
class Improved:
    """This rank's images and what is to become of them.

    Args:
        d: y - x, or 0 where no move was accepted; [n, ...].
        takes: true where one was, of every rank's images; [N] on the CPU.
    """

    d: Tensor
    takes: Tensor


def begin(parts: Parts) -> Reinforcement:
    """MEND on a recipe.

    Raises:
        UserError: a reward has no gradient.
    """
    return Reinforcement(parts, MendLearner(parts))


class MendLearner:
    """The learner; differentiable rewards are asked here, those of the rollout are only measured."""

    def __init__(self, parts: Parts):
        self.recipe, self.policy, self.world, self.micro_batch = parts.recipe, parts.policy, parts.world, parts.micro_batch
        self.settings = cast(MendSettings, parts.recipe.objective)
        self._sigmas = self.policy.model.levels(self.recipe.rollout.steps)
        self.objective = NearLevel(int((self._sigmas[:-1] - self.settings.level).abs().argmin()))
        self.update = RoleOptimizer(self.policy, "current", self.policy.parameters, self.recipe.optimizer, self.world)
        rewards = {name: parts.rewards[name] for name in self.settings.followed}
        self._followed = Followed(rewards, self.settings.improve, self.policy, self.world, self.micro_batch)
        self._tau, self._floor = self.settings.tau, cast(float | None, None)

    @property
    def updates(self) -> dict[str, RoleOptimizer]:
        """By the role whose weights they move."""
        return {"current": self.update}

    def state(self) -> dict[str, Any]:
        """tau and the floor of kappa."""
        return {"tau": self._tau, "floor": self._floor}

    def load(self, state: Mapping[str, Any]) -> None:
        """Goes on from a checkpoint's `state`."""
        self._tau, self._floor = state["tau"], state["floor"]

    def learn(self, step: int, rollout: ScoredRollout, phases: Phases) -> dict[str, float]:
        """Improves every image of the rollout, then all optimizer steps; returns mean metrics."""
        improved, metrics = self._improved(rollout)
        made = Updates(self.update, self.policy, self.recipe.ema, self.recipe.ema_every, phases)
        for chunk in shares(self.recipe.optimizer.steps_per_rollout, self.recipe.seed, step, rollout):
            if not chunk:
                continue
            own, of = torch.tensor(rollout.own(chunk), dtype=torch.long), row_weights(improved.takes[chunk], self.settings.keep)
            weight = torch.zeros(len(improved.takes)).index_put((torch.tensor(chunk),), of)[own + rollout.indices.start]
            sums = self.micro_batch.run_with_backoff(
                "train",
                lambda size, own=own, weight=weight: self._gradients(rollout, improved, own, weight, size),
                memory_saver(self.recipe, self.policy),
                self.policy,
            )
            made.make(sums, 1)  # the weights have divided already
        self.policy.average("old", 0.0)
        return metrics | made.metrics(self.recipe.optimizer.steps_per_rollout)

    def _improved(self, rollout: ScoredRollout) -> tuple[Improved, dict[str, float]]:
        """The moves that are accepted, by this rollout's tau and floor, which then go on to the next one's."""
        o, number = self.settings, len(rollout.kept)
        x0, prompts = rollout.x0, rollout.prompts
        with self._followed.at_hand():
            own, gradient = self._followed.gradient(x0, prompts)
            versions = [moved(x0, gradient, length) for length in o.moves]
            tried = torch.stack([self._followed.values(y, prompts) for y in versions])
        rewards = self.world.gather(own, number).cpu()
        self._floor = raised_floor(self._floor, rewards)
        kappa = ceilings(rewards, rollout.groups, o.quantile, self._floor).to(own)
        here = kappa[rollout.indices.start : rollout.indices.stop]
        squares = torch.stack([(y - x0).square().flatten(1).mean(1) for y in versions])
        which = accepted(own, tried, squares, here, self._tau)
        # where none is accepted, -1 is the last version: the sample itself
        each = which, torch.arange(len(which), device=which.device)
        d = torch.stack([*versions, x0])[each] - x0
        gain, move = torch.cat([tried, own[None]])[each] - own, torch.cat([squares, torch.zeros_like(own)[None]])[each]
        table = self.world.gather(torch.stack([(which >= 0).to(own), gain, move], 1), number).cpu()
        there = table[:, 0] > 0
        share, of = float(there.double().mean()), max(1, int(there.sum()))
        metrics = {"backprop_reward": float(rewards.double().mean()), "accepted": share, "tau": self._tau}
        metrics |= {"gain": float(table[:, 1].double().sum()) / of, "move": float(table[:, 2].double().sum()) / of}
        self._tau = adapted_tau(self._tau, share)
        return Improved(d, there), metrics

    def _gradients(self, rollout: ScoredRollout, improved: Improved, own: Tensor, weight: Tensor, size: int) -> dict[str, Tensor]:
        """Puts this rank's part of the loss's gradient into .grad; returns its part of the loss."""
        assert rollout.path is not None
        self.update.clear()
        device, sigma = rollout.x0.device, self._sigmas[self.objective.step].to(rollout.x0.device)
        total = torch.zeros((), device=device)
        for rows in parts(len(own), size):
            x, given = rollout.path.states[own[rows], 0].to(device), rollout.conditioning.select(own[rows])
            v = self.policy.velocity("current", x, sigma, given)
            with torch.no_grad():
                same = self.policy.same_version("old", "current")
                v_old = v.detach() if same else self.policy.velocity("old", x, sigma, given)
            loss = (weight[rows].to(device) * mend_loss(v, v_old, improved.d[own[rows].to(device)], sigma)).sum()
            loss.backward()
            total += loss.detach()
        return {"loss": total}
