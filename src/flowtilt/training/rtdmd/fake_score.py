"""The student's own score, learnt beside it, and the gradient in which it meets the teacher's: AC-DMD (arXiv 2605.26108).

A second LoRA on the same base learns the velocity of what the student draws, from samples at whatever level their
simulation stopped; no image is needed. Formulas: `objectives.rtdmd`.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from flowtilt.config import Recipe
from flowtilt.device.micro_batch import MicroBatch, parts
from flowtilt.distributed.world import World
from flowtilt.flow import per_sample
from flowtilt.lora import Lora
from flowtilt.methods.rtdmd import MatchingSettings
from flowtilt.models.conditioning import Conditioning
from flowtilt.models.guidance import guided
from flowtilt.objectives.rtdmd import (
    consistency_loss,
    distribution_matching_gradient,
    draw_renoise_times,
    fake_score_loss,
    renoise,
)
from flowtilt.policy.roles import Policy
from flowtilt.seeding import generator
from flowtilt.solvers import sde_step
from flowtilt.training.learner import memory_saver
from flowtilt.training.optimizer import RoleOptimizer
from flowtilt.training.timing import Phases

ROLE = "fake"


@dataclass(frozen=True)
class Samples:
    """This rank's n samples of a student.

    Args:
        x_s: at the levels s, [n, ...] and [n].
        conditioning: of their captions.
        positions: what tells each from all others of the run; its noise and times follow from it.
    """

    x_s: Tensor
    s: Tensor
    conditioning: Conditioning
    positions: Sequence[tuple[int, ...]]

    def __len__(self) -> int:
        return len(self.s)

    def select(self, rows: Tensor) -> "Samples":
        """The samples `rows` [m]."""
        there = rows.to(self.x_s.device)
        return Samples(self.x_s[there], self.s[there], self.conditioning.select(rows), [self.positions[k] for k in rows.tolist()])


class FakeScore:
    """A policy's role "fake" and its optimizer.

    Args:
        below: frozen LoRAs beneath it.
    """

    def __init__(
        self,
        recipe: Recipe,
        settings: MatchingSettings,
        policy: Policy,
        world: World,
        micro_batch: MicroBatch,
        base_loras: Sequence[Lora] = (),
    ):
        self._recipe, self._settings, self._policy, self._micro_batch = recipe, settings, policy, micro_batch
        weights = policy.add_role(ROLE, recipe.seed, base_loras)
        optimizer = recipe.optimizer.model_copy(update={"lr": settings.fake_lr, "half_life": None, "warmup": 0, "weight_decay": 0.0})
        self.update = RoleOptimizer(policy, ROLE, weights, optimizer, world)

    def learn(self, samples: Samples, number: int, phases: Phases) -> dict[str, float]:
        """One update on the samples of all ranks, `number` in sum; returns mean metrics."""
        sums = self._micro_batch.run_with_backoff(
            "fake", lambda size: self._gradients(samples, number, size), memory_saver(self._recipe, self._policy), self._policy
        )
        norm = self.update.step(sums, phases)
        logged = {name: float(value) / number for name, value in sums.items()}
        return {**logged, "fake_grad_norm": norm, "skipped_updates": float(not norm < float("inf"))}

    def _gradients(self, samples: Samples, number: int, size: int) -> dict[str, Tensor]:
        self.update.clear()
        names = ("fake_loss", *(("fake_consistency",) if self._settings.consistency else ()))
        sums = {name: torch.zeros((), device=samples.x_s.device) for name in names}
        for rows in parts(len(samples), size):
            loss, metrics = self._loss(samples.select(rows))
            (loss.sum() / number).backward()
            for name, value in metrics.items():
                sums[name] += value.sum()
        return sums

    def _loss(self, samples: Samples) -> tuple[Tensor, dict[str, Tensor]]:
        """Loss [n] and metrics [n]."""
        o = self._settings
        (u, step), (noise, first, second) = _draws(self._recipe.seed, "fake", samples, 2, 3)
        t = draw_renoise_times(samples.s, u)
        x_t, target, weight = renoise(samples.x_s, samples.s, t, noise)
        v = self._policy.velocity(ROLE, x_t, t, samples.conditioning)
        matching = fake_score_loss(v, target, weight)
        metrics = {"fake_loss": matching.detach()}
        if not o.consistency:
            return matching, metrics
        later = (t - o.consistency_span * (1 - step)).clamp_min(0)
        ahead = []
        for z in (first, second):
            x, _, _ = sde_step(x_t, v.detach(), t, later, z, "cps", self._recipe.rollout.cps_eta())
            ahead.append(x - per_sample(later, x) * self._policy.velocity(ROLE, x, later, samples.conditioning))
        consistency = consistency_loss(x_t - per_sample(t, x_t) * v, *ahead)
        return matching + o.consistency * consistency, metrics | {"fake_consistency": consistency.detach()}

    @torch.no_grad()
    def gradient(self, samples: Samples) -> tuple[Tensor, dict[str, Tensor]]:
        """g [n, ...], along which -x_s comes nearer to the teacher's distribution, and metrics [n]."""
        empty = self._policy.model.encode_negative() if self._settings.teacher_guidance != 1 else None
        found = self._micro_batch.run_with_backoff(
            "match",
            lambda size: [self._gradient(samples.select(rows), empty) for rows in parts(len(samples), size)],
            counter=self._policy,
        )
        # a rank may have no image of an update
        g = torch.cat([g for g, _ in found]) if found else torch.zeros_like(samples.x_s)
        gap = torch.cat([gap for _, gap in found]) if found else torch.zeros_like(samples.s)
        return g, {"teacher_gap": gap}

    def _gradient(self, samples: Samples, empty: Conditioning | None) -> tuple[Tensor, Tensor]:
        o, r = self._settings, self._recipe.rollout
        (u,), (noise, z) = _draws(self._recipe.seed, "match", samples, 1, 2)
        t = draw_renoise_times(samples.s, u)
        x_t, _, _ = renoise(samples.x_s, samples.s, t, noise)
        v_fake = self._policy.velocity(ROLE, x_t, t, samples.conditioning)
        v_teacher = guided(self._policy, "teacher", samples.conditioning, empty, o.teacher_guidance)(x_t, t)
        projected = z if o.normaliser == "noisy" else None
        g = distribution_matching_gradient(samples.x_s, x_t, v_teacher, v_fake, samples.s, t, projected, r.cps_eta())
        return g, (v_fake - v_teacher).square().flatten(1).mean(1)


def _draws(seed: int, purpose: str, samples: Samples, uniform: int, normal: int) -> tuple[Tensor, Tensor]:
    """Uniform numbers [uniform, n] in [0, 1) and normal noises [normal, n, ...], each sample's from its own generator."""
    us, zs = [], []
    for position in samples.positions:
        rng = generator(seed, purpose, *position)
        us.append(torch.rand(uniform, generator=rng))
        zs.append(torch.randn(normal, *samples.x_s.shape[1:], generator=rng))
    device = samples.x_s.device
    return torch.stack(us, 1).to(device), torch.stack(zs, 1).to(device)
