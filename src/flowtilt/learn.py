"""A rollout's optimizer steps: noised samples, gradients over all ranks, one update after another."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from flowtilt.config import Recipe
from flowtilt.distributed import World
from flowtilt.flow import sigma_schedule
from flowtilt.memory import MicroBatch
from flowtilt.models.conditioning import Conditioning
from flowtilt.objectives import Objective, ema_decay
from flowtilt.phases import Phases
from flowtilt.policy import Policy
from flowtilt.rollout import Pairs, Sampler, draw_times
from flowtilt.seeding import generator
from flowtilt.trajectory import Trajectory, Transitions


@dataclass(frozen=True)
class Scored:
    """This rank's share of a rollout.

    Args:
        x0, advantages, conditioning: of its n images.
        path: their stochastic steps, for a method that trains those.
        indices: which of all images they are.
        kept: false where an image is not trained on, by any rank; [all images] on the CPU.
    """

    x0: Tensor
    advantages: Tensor
    conditioning: Conditioning
    path: Trajectory | None
    indices: range
    kept: Tensor


class Learner:
    """Owns the optimizer. `optimizer_step` counts the updates that were made."""

    def __init__(self, recipe: Recipe, policy: Policy, objective: Objective, world: World, micro_batch: MicroBatch):
        o = recipe.optimizer
        self.recipe, self.policy, self.objective, self.world, self.micro_batch = recipe, policy, objective, world, micro_batch
        self.optimizer = torch.optim.AdamW(policy.parameters, lr=o.lr, betas=o.betas, eps=o.eps, weight_decay=o.weight_decay)
        self.optimizer_step = 0
        self._recompute = False
        if recipe.model.recompute is True:
            self.recompute = True

    def learn(self, step: int, rollout: Scored, phases: Phases) -> dict[str, float]:
        """All optimizer steps of one rollout, each on its own share of the images; returns mean metrics."""
        per_rollout = self.recipe.optimizer.steps_per_rollout
        order = torch.randperm(len(rollout.kept), generator=generator(self.recipe.seed, "order", step))
        order = order[rollout.kept[order]].tolist()
        number = len(order)
        means: dict[str, float] = {}
        skipped = empty = 0
        for k in range(per_rollout):
            chunk = order[number * k // per_rollout : number * (k + 1) // per_rollout]
            if not chunk:  # the optimizer would still decay weights and follow its averages
                empty += 1
                continue
            own = self._rows(step, rollout, [i - rollout.indices.start for i in chunk if i in rollout.indices])
            number_of_rows = len(chunk) * self.recipe.rows_per_image()
            sums = self.micro_batch.fit(
                "train", lambda size, own=own, of=number_of_rows: self._gradients(own, of, size), self._save_memory, self.policy
            )
            norm = self._update(sums, phases)
            skipped += not norm < float("inf")
            for name, value in {**{name: float(value) / number_of_rows for name, value in sums.items()}, "grad_norm": norm}.items():
                means[name] = means.get(name, 0.0) + value
        made = per_rollout - empty
        return {**{name: value / made for name, value in means.items()}, "skipped_updates": skipped + empty, "lr": self.rate()}

    def _save_memory(self) -> bool:
        """Turns gradient checkpointing on; false where it is on already, was not left to us, or would be on one rank of a sharded base."""
        if self.recompute or self.recipe.model.recompute != "auto" or self.recipe.shard != "none" or not self.policy.can_recompute:
            return False
        self.recompute = True
        return True

    @property
    def recompute(self) -> bool:
        """Whether activations are computed anew in the backward pass: slower, in less memory, to the same bits."""
        return self._recompute

    @recompute.setter
    def recompute(self, on: bool) -> None:
        self.policy.recompute(on)
        self._recompute = on

    def _rows(self, step: int, rollout: Scored, own: list[int]) -> Pairs | Transitions:
        """What is trained of this rank's images `own`: each at several noise levels, or at several steps of its path."""
        image = torch.tensor(own, dtype=torch.long).repeat_interleave(self.recipe.rows_per_image())
        if rollout.path is None:
            return Pairs(rollout.x0, rollout.advantages, rollout.conditioning, image, *self._times_and_noise(step, rollout, own))
        r, model = self.recipe.rollout, self.policy.model
        levels = sigma_schedule(r.steps, model.shift)
        stochastic = self.objective.stochastic(step - 1, r.steps, self.recipe.seed)
        return Transitions(
            rollout.path,
            rollout.advantages,
            rollout.conditioning,
            image,
            torch.arange(len(stochastic)).repeat(len(own)),
            levels[stochastic.start : stochastic.stop + 1],
            float(levels[1]),
            Sampler(r.solver, r.steps, r.guidance).empty(self.policy),
            r.guidance,
        )

    def _times_and_noise(self, step: int, rollout: Scored, own: list[int]) -> tuple[Tensor, Tensor]:
        """t [M] and eps [M, ...]; an image's times and noises come from its own generator."""
        settings: Any = self.recipe.objective  # of a method on clean samples, whichever
        model = self.policy.model
        sigmas = sigma_schedule(self.recipe.rollout.steps, model.shift)
        times = torch.empty(len(own), settings.times_per_image)
        eps = torch.empty(len(own), settings.times_per_image, *model.latent_shape)
        for k, i in enumerate(own):
            rng = generator(self.recipe.seed, "train", step, rollout.indices.start + i)
            times[k] = draw_times(settings.times, settings.times_per_image, sigmas, model.shift, rng)
            torch.randn(eps.shape[1:], generator=rng, out=eps[k])  # in place: a rollout's noise may be gigabytes
        return times.flatten(), eps.flatten(0, 1)

    def _gradients(self, own: Pairs | Transitions, number: int, size: int) -> dict[str, Tensor]:
        """Puts this rank's part of the gradient of the mean over all `number` rows into .grad; returns sums of the metrics."""
        for p in self.policy.parameters:
            p.grad = torch.zeros_like(p)
        sums = {name: torch.zeros((), device=own.device) for name in self.objective.metrics}
        for micro in own.micro_batches(size):
            loss, metrics = self.objective.loss(self.policy, micro)
            (loss.sum() / number).backward()
            for name, value in metrics.items():
                sums[name] += value.sum()
        return sums

    def _update(self, sums: Mapping[str, Tensor], phases: Phases) -> float:
        """Joins gradients and metrics over the ranks in one message, clips, steps; returns the norm before clipping."""
        gradients = [p.grad for p in self.policy.parameters if p.grad is not None]
        with phases("sync"):
            self.world.sum_([*gradients, *sums.values()])
        for group in self.optimizer.param_groups:
            group["lr"] = self.rate()
        norm = float(torch.nn.utils.clip_grad_norm_(self.policy.parameters, self.recipe.optimizer.clip))
        if norm < float("inf"):  # false for NaN too: a bad gradient would end in every weight
            self.optimizer.step()
            self.policy.changed()
            self.policy.average("ema", ema_decay(self.optimizer_step, self.recipe.ema))
            self.optimizer_step += 1
        return norm

    def rate(self) -> float:
        """The learning rate of the next update: linear warm-up, then 1 / (1 + s / half_life)."""
        o, s = self.recipe.optimizer, self.optimizer_step
        rate = o.lr * min(1.0, (s + 1) / (o.warmup + 1))
        return rate if o.half_life is None else rate / (1 + s / o.half_life)
