"""A rollout's optimizer steps: noised samples, gradients over all ranks, one update after another."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from flowtilt.config import OptimizerSettings, Recipe, RolloutSettings
from flowtilt.device.micro_batch import MicroBatch
from flowtilt.distributed.world import World
from flowtilt.objectives import Objective, ema_decay
from flowtilt.objectives.batches import Pairs, Transitions
from flowtilt.objectives.checking import checked_loss
from flowtilt.policy.roles import Policy
from flowtilt.seeding import generator
from flowtilt.training.balance import Balance
from flowtilt.training.optimizer import RoleOptimizer
from flowtilt.training.rows import RowMaker
from flowtilt.training.scored import ScoredRollout
from flowtilt.training.timing import Phases


class Learner:
    """Trains a policy by an objective on rollouts.

    Args:
        optimizer: AdamW's settings and the updates per rollout.
        rollout: how the rollouts are sampled; their noise levels are the training times, or their steps are trained.
        seed: of the images' order, times and noise.
        ema: greatest decay of the average.
        ema_every: updates from one step of the average to the next.
        save_memory: see `MicroBatch.run_with_backoff`.
        balance: weighs the rewards by their gradients; none leaves the advantages as they come.
    """

    def __init__(
        self,
        policy: Policy,
        objective: Objective,
        optimizer: OptimizerSettings,
        rollout: RolloutSettings,
        *,
        seed: int,
        ema: float,
        ema_every: int = 1,
        world: World,
        micro_batch: MicroBatch,
        save_memory: Callable[[], bool],
        balance: Balance | None = None,
    ):
        self.policy, self.objective, self.micro_batch, self._balance = policy, objective, micro_batch, balance
        self._updates, self._seed, self._ema, self._save_memory = optimizer.steps_per_rollout, seed, (ema, ema_every), save_memory
        self.sampled_by(rollout)
        self.update = RoleOptimizer(policy, "current", policy.parameters, optimizer, world)

    def sampled_by(self, rollout: RolloutSettings) -> None:
        """The rollouts to come are sampled by these settings."""
        self._maker = RowMaker(self.policy, self.objective, rollout, self._seed)

    @property
    def updates(self) -> dict[str, RoleOptimizer]:
        """By the role whose weights they move."""
        return {"current": self.update}

    def learn(self, step: int, rollout: ScoredRollout, phases: Phases) -> dict[str, float]:
        """All optimizer steps of one rollout, each on its own share of the images; returns mean metrics."""
        made = Updates(self.update, self.policy, *self._ema, phases)
        whole = getattr(self.objective, "whole_groups", False)
        if self._balance:
            rollout = self._balanced(self._balance, step, rollout)
        for chunk in shares(self._updates, self._seed, step, rollout, whole):
            if not chunk:  # the optimizer would still decay weights and follow its averages
                continue
            own = self.rows(step, rollout, rollout.own(chunk))
            if whole:
                own = self._completed(own, rollout, chunk)
            number_of_rows = len(chunk) * self._maker.per_image
            sums = self.micro_batch.run_with_backoff(
                "train",
                lambda size, own=own, of=number_of_rows: self._gradients(own, of, size),
                self._save_memory,
                self.policy,
            )
            made.make(sums, number_of_rows)
        self.objective.after_rollout(self.policy, self.update.count)
        return made.metrics(self._updates) | (self._balance.metrics() if self._balance else {})

    def rows(self, step: int, rollout: ScoredRollout, own: list[int]) -> Pairs | Transitions:
        """What is trained of this rank's images `own` of rollout number `step`, from 1."""
        return self._maker.rows(step, rollout, own)

    def state(self) -> dict[str, Any]:
        """What a checkpoint needs beside weights and the optimizer, as JSON."""
        return {"balance": self._balance.state()} if self._balance else {}

    def load(self, state: Mapping[str, Any]) -> None:
        """Goes on from a checkpoint's `state`."""
        if self._balance and "balance" in state:
            self._balance.load(state["balance"])

    def _balanced(self, balance: Balance, step: int, rollout: ScoredRollout) -> ScoredRollout:
        """The rollout with advantages that mix the rewards; their weights are found anew, where due, from its first update's images."""
        filled = (chunk for chunk in shares(self._updates, self._seed, step, rollout) if chunk)
        first = next(filled, None) if balance.due(self.update.count) else None
        if first:
            own, number = self.rows(step, balance.mixed(rollout, balance.weights()), rollout.own(first)), len(first) * self._maker.per_image

            def gradient(weights: Tensor) -> list[Tensor]:
                of = replace(own, advantages=balance.mixed(rollout, weights).advantages)
                self.micro_batch.run_with_backoff("train", lambda size: self._gradients(of, number, size), self._save_memory, self.policy)
                return self.update.gradient()

            balance.solve(self.update.count, gradient)
        return balance.mixed(rollout, balance.weights())

    def _completed(self, own: Any, rollout: ScoredRollout, chunk: list[int]) -> Pairs:
        """The rows with what the method makes of the measures of whole groups, of all ranks."""
        objective: Any = self.objective
        measured = self.micro_batch.run_with_backoff("train", lambda size: self._measured(own, size), self._save_memory, self.policy)
        place = {image: k for k, image in enumerate(chunk)}
        rows = torch.tensor([place[rollout.indices.start + i] for i in own.image.tolist()], dtype=torch.long)
        column = torch.arange(len(rows)) % self._maker.per_image
        table = {name: torch.zeros(len(chunk), self._maker.per_image, device=own.device) for name in objective.measures}
        for name, values in measured.items():
            table[name][rows, column] = values
        self.update.world.sum_(list(table.values()))
        table = {name: values.cpu() for name, values in table.items()}
        found = table | objective.complete(table, rollout.all_advantages[chunk], rollout.groups[chunk])
        return replace(own, given={name: values[rows, column] for name, values in found.items()})

    def _measured(self, own: Pairs, size: int) -> dict[str, Tensor]:
        """What the method measures of this rank's rows, [M] by name."""
        objective: Any = self.objective
        parts = [objective.measure(self.policy, micro) for micro in own.micro_batches(size)]
        return {name: torch.cat([part[name] for part in parts]) for name in objective.measures} if parts else {}

    def _gradients(self, own: Pairs | Transitions, number: int, size: int) -> dict[str, Tensor]:
        """Puts this rank's part of the gradient of the mean over all `number` rows into .grad; returns sums of the metrics."""
        self.update.clear()
        sums = {name: torch.zeros((), device=own.device) for name in self.objective.metrics}
        for micro in own.micro_batches(size):
            loss, metrics = checked_loss(self.objective, self.policy, micro)
            weight = getattr(micro, "weight", None)
            ((loss if weight is None else weight * loss).sum() / number).backward()
            for name, value in metrics.items():
                sums[name] += (value if weight is None else weight * value).sum()
        return sums


def shares(number: int, seed: int, step: int, rollout: ScoredRollout, whole_groups: bool = False) -> list[list[int]]:
    """The images of each of a rollout's `number` updates, in random order, the same on every rank; some are empty where few are kept.

    Args:
        whole_groups: the images of a prompt stay together.
    """
    rng = generator(seed, "order", step)
    if whole_groups:
        groups = rollout.groups[rollout.kept].unique()
        groups = groups[torch.randperm(len(groups), generator=rng)]
        chunks = [groups[len(groups) * k // number : len(groups) * (k + 1) // number] for k in range(number)]
        return [(torch.isin(rollout.groups, chunk) & rollout.kept).nonzero()[:, 0].tolist() for chunk in chunks]
    order = torch.randperm(len(rollout.kept), generator=rng)
    order = order[rollout.kept[order]].tolist()
    return [order[len(order) * k // number : len(order) * (k + 1) // number] for k in range(number)]


def averaged_update(update: RoleOptimizer, policy: Policy, ema: float, every: int, sums: Mapping[str, Tensor], phases: Phases) -> float:
    """An update of the current policy, which its average follows after each `every` updates; returns the gradient's norm."""
    before = update.count
    norm = update.step(sums, phases)
    if update.count > before and update.count % every == 0:
        policy.average("ema", ema_decay(before, ema))
    return norm


class Updates:
    """The updates of one rollout and the means of what they say.

    Args:
        update, policy, ema, every, phases: as for `averaged_update`.
    """

    def __init__(self, update: RoleOptimizer, policy: Policy, ema: float, every: int, phases: Phases):
        self._update, self._policy, self._average, self._phases = update, policy, (ema, every), phases
        self._total: dict[str, float] = {}
        self._made = self._skipped = 0

    def make(self, sums: Mapping[str, Tensor], rows: int) -> None:
        """One update from the gradient in .grad; `sums` are of the metrics over this rank's part of so many rows."""
        norm = averaged_update(self._update, self._policy, *self._average, sums, self._phases)
        self._made += 1
        self._skipped += not norm < float("inf")
        for name, value in {**{name: float(value) / rows for name, value in sums.items()}, "grad_norm": norm}.items():
            self._total[name] = self._total.get(name, 0.0) + value

    def metrics(self, planned: int) -> dict[str, float]:
        """Means over the updates that were made; those left out of the `planned` ones count as skipped."""
        means = {name: value / self._made for name, value in self._total.items()}
        return {**means, "skipped_updates": self._skipped + planned - self._made, "lr": self._update.rate()}


def memory_saver(recipe: Recipe, policy: Policy) -> Callable[[], bool]:
    """Turns gradient checkpointing on when called; false where it is on, was not left to us, or would be on one rank of a sharded base."""

    def save() -> bool:
        if policy.recomputes or recipe.model.recompute != "auto" or recipe.shard != "none" or not policy.can_recompute:
            return False
        policy.recompute()
        return True

    return save
