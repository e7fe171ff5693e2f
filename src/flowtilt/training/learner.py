"""A rollout's optimizer steps: noised samples, gradients over all ranks, one update after another."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from flowtilt.build import sampler_of
from flowtilt.config import OptimizerSettings, Recipe, RolloutSettings
from flowtilt.device.micro_batch import MicroBatch
from flowtilt.distributed.world import World
from flowtilt.models.conditioning import Conditioning
from flowtilt.objectives import Objective, ema_decay
from flowtilt.objectives.batches import Pairs, Transitions, draw_times
from flowtilt.objectives.checking import checked_loss
from flowtilt.policy.roles import Policy
from flowtilt.prompts import Prompt
from flowtilt.sampling.trajectory import Trajectory
from flowtilt.seeding import generator
from flowtilt.training.optimizer import Update
from flowtilt.training.timing import Phases


@dataclass(frozen=True)
class Scored:
    """This rank's share of a rollout.

    Args:
        x0, advantages, conditioning: of its n images.
        path: their stochastic steps, for a method that trains those.
        indices: which of all images they are.
        kept: false where an image is not trained on, by any rank; [all images] on the CPU.
        prompts: of its n images.
    """

    x0: Tensor
    advantages: Tensor
    conditioning: Conditioning
    path: Trajectory | None
    indices: range
    kept: Tensor
    prompts: Sequence[Prompt]

    def own(self, images: Sequence[int]) -> list[int]:
        """Which of this rank's n images are among those."""
        return [i - self.indices.start for i in images if i in self.indices]


class Learner:
    """Trains a policy by an objective on rollouts.

    Args:
        optimizer: AdamW's settings and the updates per rollout.
        rollout: how the rollouts are sampled; their noise levels are the training times, or their steps are trained.
        seed: of the images' order, times and noise.
        ema: greatest decay of the average.
        save_memory: see `MicroBatch.fit`.
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
        world: World,
        micro_batch: MicroBatch,
        save_memory: Callable[[], bool],
    ):
        self.policy, self.objective, self.rollout, self.micro_batch = policy, objective, rollout, micro_batch
        self._updates, self._seed, self._ema, self._save_memory = optimizer.steps_per_rollout, seed, ema, save_memory
        self._rows_per_image = objective.rows_per_image(rollout.steps)
        self.update = Update(policy, "current", policy.parameters, optimizer, world)

    @property
    def updates(self) -> dict[str, Update]:
        """By the role whose weights they move."""
        return {"current": self.update}

    def learn(self, step: int, rollout: Scored, phases: Phases) -> dict[str, float]:
        """All optimizer steps of one rollout, each on its own share of the images; returns mean metrics."""
        means: dict[str, float] = {}
        skipped = empty = 0
        for chunk in shares(self._updates, self._seed, step, rollout):
            if not chunk:  # the optimizer would still decay weights and follow its averages
                empty += 1
                continue
            own = self._rows(step, rollout, rollout.own(chunk))
            number_of_rows = len(chunk) * self._rows_per_image
            sums = self.micro_batch.fit(
                "train",
                lambda size, own=own, of=number_of_rows: self._gradients(own, of, size),
                self._save_memory,
                self.policy,
            )
            norm = averaged_update(self.update, self.policy, self._ema, sums, phases)
            skipped += not norm < float("inf")
            for name, value in {**{name: float(value) / number_of_rows for name, value in sums.items()}, "grad_norm": norm}.items():
                means[name] = means.get(name, 0.0) + value
        self.objective.after_rollout(self.policy, self.update.count)
        made = self._updates - empty
        means = {name: value / made for name, value in means.items()}
        return {**means, "skipped_updates": skipped + empty, "lr": self.update.rate()}

    def _rows(self, step: int, rollout: Scored, own: list[int]) -> Pairs | Transitions:
        """What is trained of this rank's images `own`: each at several noise levels, or at several steps of its path."""
        image = torch.tensor(own, dtype=torch.long).repeat_interleave(self._rows_per_image)
        if rollout.path is None:
            return Pairs(rollout.x0, rollout.advantages, rollout.conditioning, image, *self._times_and_noise(step, rollout, own))
        r, model = self.rollout, self.policy.model
        levels = model.levels(r.steps)
        steps = rollout.path.steps
        return Transitions(
            rollout.path,
            rollout.advantages,
            rollout.conditioning,
            image,
            torch.arange(len(steps)).repeat(len(own)),
            levels[steps.start : steps.stop + 1],
            float(levels[1]),
            sampler_of(r).empty(self.policy),
            r.guidance,
        )

    def _times_and_noise(self, step: int, rollout: Scored, own: list[int]) -> tuple[Tensor, Tensor]:
        """t [M] and eps [M, ...]; an image's times and noises come from its own generator."""
        settings: Any = self.objective  # a method on clean samples, whichever
        model = self.policy.model
        sigmas, between = model.levels(self.rollout.steps), partial(model.levels.at, steps=self.rollout.steps)
        times = torch.empty(len(own), settings.times_per_image)
        eps = torch.empty(len(own), settings.times_per_image, *model.latent_shape)
        for k, i in enumerate(own):
            rng = generator(self._seed, "train", step, rollout.indices.start + i)
            times[k] = draw_times(settings.times, settings.times_per_image, sigmas, between, rng)
            torch.randn(eps.shape[1:], generator=rng, out=eps[k])  # in place: a rollout's noise may be gigabytes
        return times.flatten(), eps.flatten(0, 1)

    def _gradients(self, own: Pairs | Transitions, number: int, size: int) -> dict[str, Tensor]:
        """Puts this rank's part of the gradient of the mean over all `number` rows into .grad; returns sums of the metrics."""
        self.update.clear()
        sums = {name: torch.zeros((), device=own.device) for name in self.objective.metrics}
        for micro in own.micro_batches(size):
            loss, metrics = checked_loss(self.objective, self.policy, micro)
            (loss.sum() / number).backward()
            for name, value in metrics.items():
                sums[name] += value.sum()
        return sums


def shares(number: int, seed: int, step: int, rollout: Scored) -> list[list[int]]:
    """The images of each of a rollout's `number` updates, in random order, the same on every rank; some are empty where few are kept."""
    order = torch.randperm(len(rollout.kept), generator=generator(seed, "order", step))
    order = order[rollout.kept[order]].tolist()
    return [order[len(order) * k // number : len(order) * (k + 1) // number] for k in range(number)]


def averaged_update(update: Update, policy: Policy, ema: float, sums: Mapping[str, Tensor], phases: Phases) -> float:
    """An update of the current policy, which its average then follows; returns the gradient's norm."""
    before = update.count
    norm = update.make(sums, phases)
    if update.count > before:
        policy.average("ema", ema_decay(before, ema))
    return norm


def memory_saver(recipe: Recipe, policy: Policy) -> Callable[[], bool]:
    """Turns gradient checkpointing on when called; false where it is on, was not left to us, or would be on one rank of a sharded base."""

    def save() -> bool:
        if policy.recomputes or recipe.model.recompute != "auto" or recipe.shard != "none" or not policy.can_recompute:
            return False
        policy.recompute()
        return True

    return save
