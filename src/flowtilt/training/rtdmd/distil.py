"""Distillation to a few steps, RTDMD's cold start (AC-DMD, arXiv 2605.26108): no reward, no image, only captions and the teacher.

A step is `fake_updates` updates of the fake score, each on fresh samples of the student, then one of the student. Every
sample stops after a number of steps of its own, and its gradient reaches the last of these steps alone.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor

from flowtilt.config import Recipe
from flowtilt.device.micro_batch import MicroBatch, parts
from flowtilt.distributed.world import World
from flowtilt.errors import UserError
from flowtilt.flow import per_sample
from flowtilt.lora import Lora
from flowtilt.methods.rtdmd import ACDMDSettings
from flowtilt.models.conditioning import Conditioning
from flowtilt.objectives.rtdmd import LEAST_GAP, MOST_TIME, kappa, surrogate
from flowtilt.policy.roles import Policy
from flowtilt.prompts import Prompt, PromptWalk
from flowtilt.seeding import generator, noise, step_noise
from flowtilt.solvers import sde_step
from flowtilt.training.learner import averaged_update, memory_saver
from flowtilt.training.optimizer import RoleOptimizer
from flowtilt.training.parts import Parts
from flowtilt.training.rtdmd.fake_score import FakeScore, Samples
from flowtilt.training.timing import Phases


@dataclass(frozen=True)
class Stopped:
    """Where the simulation of n samples stopped: the state before the last step and its level, x_s after it and its level s."""

    before: Tensor
    sigma: Tensor
    x_s: Tensor
    s: Tensor


@torch.no_grad()
def simulate(
    policy: Policy, start: Tensor, given: Conditioning, stops: Tensor, sigmas: Tensor, eta: float, fresh: Callable[[Tensor, int], Tensor]
) -> Stopped:
    """The student's own way from noise, each sample as far as `stops` says.

    Args:
        start: noise [n, ...].
        stops: steps of each, [n] on the CPU, from 1 to the schedule's.
        sigmas: the student's levels, [S + 1].
        fresh: standard normal noise [m, ...] of the rows [m] at a step.
    """
    x, before, after = start.clone(), start.clone(), start.clone()
    for j in range(int(stops.max())):
        rows = (stops > j).nonzero().flatten()
        there = rows.to(start.device)
        s, s_next = sigmas[j].to(start.device), sigmas[j + 1].to(start.device)
        v = policy.velocity("current", x[there], s, given.select(rows))
        stepped, _, _ = sde_step(x[there], v, s, s_next, fresh(rows, j).to(start.device), "cps", eta)
        before[there], after[there] = x[there], stepped
        x[there] = stepped
    levels = sigmas.to(start.device)
    ends = stops.to(start.device)
    return Stopped(before, levels[ends - 1], after, levels[ends])


def begin(parts: Parts) -> "ACDMDLearner":
    """The first stage of RTDMD on a recipe."""
    settings = cast(ACDMDSettings, parts.recipe.objective)
    return ACDMDLearner(parts.recipe, settings, parts.policy, parts.walk, parts.world, parts.micro_batch)


class ACDMDLearner:
    """A student of few steps that comes to draw what its teacher draws with guidance in many.

    Raises:
        UserError: the student's first step ends at a level from which there are no times to noise to.
    """

    def __init__(self, recipe: Recipe, settings: ACDMDSettings, policy: Policy, walk: PromptWalk, world: World, micro_batch: MicroBatch):
        self.recipe, self.settings, self.policy = recipe, settings, policy
        self.walk, self.world, self.micro_batch = walk, world, micro_batch
        first = policy.model.levels(recipe.rollout.steps)[1]
        if not first + LEAST_GAP < MOST_TIME:
            raise UserError(
                f"rollout.steps: the first of {recipe.rollout.steps} steps ends at noise level {float(first):.3f}, and a fake score learns "
                f"only below {MOST_TIME - LEAST_GAP:.2f}; take fewer"
            )
        self.images = recipe.rollout.images() * (settings.fake_updates + 1)
        """Samples that a step simulates."""
        self.base_loras: dict[str, Lora] = {}
        """None: student and fake score begin on the base itself."""
        self.fake = FakeScore(recipe, settings, policy, world, micro_batch)
        self.student = RoleOptimizer(policy, "current", policy.parameters, recipe.optimizer, world)

    @property
    def updates(self) -> dict[str, RoleOptimizer]:
        """By the role whose weights they move."""
        return {"current": self.student, "fake": self.fake.update}

    def step(self, step: int, phases: Phases) -> dict[str, float]:
        """Step number `step`, from 1; returns metrics."""
        means: dict[str, float] = {}
        skipped = 0.0
        updates, prompts, number = self.settings.fake_updates, self.recipe.rollout.prompts, self.recipe.rollout.images()
        captions: list[Prompt] = []
        for k in range(updates):
            captions = self.walk.take(((step - 1) * updates + k) * prompts, prompts)
            with phases("sample"):
                _, samples = self._simulated(step, k, captions)
            with phases("train"):
                logged = self.fake.learn(samples, number, phases)
            skipped += logged.pop("skipped_updates")
            for name, value in logged.items():
                means[name] = means.get(name, 0.0) + value / updates
        with phases("sample"):
            stopped, samples = self._simulated(step, updates, captions)
        with phases("train"):
            logged = self._learn(stopped, samples, number, phases)
        return means | logged | {"skipped_updates": skipped + logged["skipped_updates"]}

    def state(self) -> dict[str, Any]:
        """Nothing beside weights and optimizers."""
        return {}

    def load(self, state: Mapping[str, Any]) -> None:
        """Nothing to go on with."""

    def close(self) -> None:
        """Nothing goes on in the background."""

    def _simulated(self, step: int, draw: int, captions: list[Prompt]) -> tuple[Stopped, Samples]:
        """This rank's share of a batch of the student's samples."""
        r, policy, seed = self.recipe.rollout, self.policy, self.recipe.seed
        mine = self.world.share(r.images())
        positions = [(step, draw, i // r.images_per_prompt, i % r.images_per_prompt) for i in mine]
        given = policy.model.encode([captions[i // r.images_per_prompt].caption for i in mine])
        sigmas = policy.model.levels(r.steps)
        # every level equally often, whichever samples have it
        order = torch.randperm(r.images(), generator=generator(seed, "stops", step, draw))
        stops = (order % r.steps + 1)[mine.start : mine.stop]
        start = noise(seed, "distil", positions, policy.model.latent_shape).to(policy.model.device)
        fresh = step_noise(seed, "distil step", positions, policy.model.latent_shape)

        def run(size: int) -> Stopped:
            found = [
                simulate(
                    policy, start[rows.to(start.device)], given.select(rows), stops[rows], sigmas, r.cps_eta(),
                    lambda within, j, rows=rows: fresh(rows[within], j),
                )
                for rows in parts(len(stops), size)
            ]  # fmt: skip
            return Stopped(*(torch.cat([getattr(part, name) for part in found]) for name in ("before", "sigma", "x_s", "s")))

        stopped = self.micro_batch.run_with_backoff("sample", run, counter=policy)
        return stopped, Samples(stopped.x_s, stopped.s, given, positions)

    def _learn(self, stopped: Stopped, samples: Samples, number: int, phases: Phases) -> dict[str, float]:
        """The student's update."""
        g, metrics = self.fake.gradient(samples)
        # d x_s / d v = -kappa: teacher and fake score are done with before the student's graph begins
        cotangent = -per_sample(kappa(stopped.sigma, stopped.s, self.recipe.rollout.cps_eta()), g) * g / math.prod(g.shape[1:])
        sums = {name: value.sum() for name, value in metrics.items()}

        def gradients(size: int) -> None:
            self.student.clear()
            for rows in parts(len(samples), size):
                there = rows.to(g.device)
                v = self.policy.velocity("current", stopped.before[there], stopped.sigma[there], samples.conditioning.select(rows))
                (surrogate(v, cotangent[there]).sum() / number).backward()

        self.micro_batch.run_with_backoff("train", gradients, memory_saver(self.recipe, self.policy), self.policy)
        norm = averaged_update(self.student, self.policy, self.recipe.ema, self.recipe.ema_every, sums, phases)
        logged = {name: float(value) / number for name, value in sums.items()}
        return {**logged, "grad_norm": norm, "skipped_updates": float(not norm < float("inf")), "lr": self.student.rate()}
