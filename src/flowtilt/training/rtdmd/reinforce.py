"""RTDMD's second stage (arXiv 2605.26108): a few-step student learns from rewards in three ways at once.

SubGRPO, a policy gradient, trains a few of the stochastic steps; the last step, which is deterministic, follows the
gradient of differentiable rewards through the VAE, and AC-DMD's, which keeps it near the teacher. The fake score goes
on learning from the images that the student has finished. All of it is one loss, one mean over the rows of all images.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar, cast

import torch
from torch import Tensor

from flowtilt.config import Recipe, RolloutSettings
from flowtilt.device.micro_batch import MicroBatch, parts
from flowtilt.distributed.world import World
from flowtilt.errors import UserError
from flowtilt.flow import predict_x0
from flowtilt.io.run_folder import RunFolder
from flowtilt.lora import Lora, are_named, join
from flowtilt.lora.find import run_of
from flowtilt.lora.fit import check, shapes_of
from flowtilt.lora.read import read_lora
from flowtilt.methods.rtdmd import RTDMDSettings
from flowtilt.objectives.grpo import grpo_loss
from flowtilt.objectives.rtdmd import subgrpo_steps, surrogate
from flowtilt.policy.roles import Policy
from flowtilt.rewards import Reward
from flowtilt.sampling.trajectory import KeptSteps, Trajectory
from flowtilt.solvers import sde_step
from flowtilt.training.followed import Followed
from flowtilt.training.learner import Updates, memory_saver, shares
from flowtilt.training.optimizer import RoleOptimizer
from flowtilt.training.parts import Parts
from flowtilt.training.reinforcement import Reinforcement, Stateless
from flowtilt.training.rtdmd.fake_score import ROLE, FakeScore, Samples
from flowtilt.training.scored import ScoredRollout
from flowtilt.training.timing import Phases


@dataclass(frozen=True)
class SubGRPO:
    """What its rollouts are: every step but the last draws noise and is kept."""

    drops_flat: ClassVar[bool] = False
    """The last step learns from every image."""

    trained_steps: int

    def keeps(self, rollout: int, settings: RolloutSettings, seed: int) -> KeptSteps:
        """All but the last, whichever rollout; those that are not trained have one noise for all images of a prompt."""
        every = range(settings.steps - 1)
        trained = subgrpo_steps(rollout, settings.steps, self.trained_steps, seed)
        return KeptSteps(every, "cps", settings.cps_eta(), frozenset(every) - frozenset(trained))

    def prepare(self, advantages: Tensor, groups: Tensor) -> Tensor:
        """A, whitened once more over the rollout: (A - mean A) / (std A + 1e-4), as published; [N], NaN as it was."""
        known = advantages[~advantages.isnan()].double()
        return ((advantages.double() - known.mean()) / (known.std(correction=0) + 1e-4)).float()


def _kept_fake(run: Path) -> Path:
    """A run's copy of the LoRA below its fake score."""
    return RunFolder(run).base_loras / RunFolder.fake_score


def _fake_base(recipe: Recipe, resume: Path | None) -> Lora | None:
    """The LoRA from which a second stage's fake score goes on; none where the recipe has none.

    That of a second stage comes joined with the one that it was trained on.

    Raises:
        UserError: there is none where the recipe says, or what it was trained on is gone.
    """
    o = cast(RTDMDSettings, recipe.objective)
    if not o.matching:
        return None
    if resume and _kept_fake(resume).is_dir():
        return read_lora(_kept_fake(resume))
    where = o.fake or (str(RunFolder(recipe.lora.on[-1]).fake_score) if recipe.lora.on else None)
    if where is None:
        return None
    try:
        fake = read_lora(where)
        if not fake.parents:
            return fake
        base_fake = read_lora(_kept_fake(run_of(where) or Path(where)))
        if not are_named([base_fake], fake.parents):
            raise UserError(f"lora {base_fake.source}: is not what {fake.source} was trained on top of")
        return join([base_fake, fake])
    except UserError as error:
        raise UserError(f"objective.fake: {error}; name the fake/ of a distillation's run, or set objective.matching = 0") from None


def begin(parts: Parts) -> Reinforcement:
    """The second stage of RTDMD on a recipe.

    Raises:
        UserError: the fake score's LoRA is not there, or belongs to another base; a reward has no gradient.
    """
    settings = cast(RTDMDSettings, parts.recipe.objective)
    base = _fake_base(parts.recipe, parts.resume)
    if base:
        check(base, shapes_of(parts.policy.model.network))
    learner = RTDMDLearner(parts.recipe, settings, parts.policy, parts.rewards, base, parts.world, parts.micro_batch)
    return Reinforcement(parts, learner, {ROLE: base} if base else {})


class RTDMDLearner(Stateless):
    """The learner. Advantages come with the rollout; differentiable rewards are asked here.

    Args:
        beneath: the fake score from which this one goes on; none begins at the base.
    """

    def __init__(
        self,
        recipe: Recipe,
        settings: RTDMDSettings,
        policy: Policy,
        rewards: Mapping[str, Reward],
        base_fake: Lora | None,
        world: World,
        micro_batch: MicroBatch,
    ):
        self.recipe, self.settings, self.policy, self.world, self.micro_batch = recipe, settings, policy, world, micro_batch
        self.objective = SubGRPO(settings.trained_steps)
        self.update = RoleOptimizer(policy, "current", policy.parameters, recipe.optimizer, world)
        self.fake = FakeScore(recipe, settings, policy, world, micro_batch, [base_fake] if base_fake else []) if settings.matching else None
        self._followed = Followed({name: rewards[name] for name in settings.backprop}, settings.backprop, policy, world, micro_batch)

    @property
    def updates(self) -> dict[str, RoleOptimizer]:
        """By the role whose weights they move."""
        return {"current": self.update, **({"fake": self.fake.update} if self.fake else {})}

    def learn(self, step: int, rollout: ScoredRollout, phases: Phases) -> dict[str, float]:
        """The fake score's update, then the student's; returns mean metrics."""
        assert rollout.path is not None
        r, o = self.recipe.rollout, self.settings
        positions = [(step, 0, i // r.images_per_prompt, i % r.images_per_prompt) for i in rollout.indices]
        finished = Samples(rollout.x0, torch.zeros(len(rollout.x0), device=rollout.x0.device), rollout.conditioning, positions)
        metrics = self.fake.learn(finished, r.images(), phases) if self.fake else {}
        trained = subgrpo_steps(step - 1, r.steps, o.trained_steps, self.recipe.seed)
        skipped = metrics.pop("skipped_updates", 0.0)
        made = Updates(self.update, self.policy, self.recipe.ema, self.recipe.ema_every, phases)
        for chunk in shares(self.recipe.optimizer.steps_per_rollout, self.recipe.seed, step, rollout):
            if not chunk:
                continue
            own = torch.tensor(rollout.own(chunk), dtype=torch.long)
            cotangent, logged = self._last_step(rollout, rollout.path, finished, own)
            sums = self.micro_batch.run_with_backoff(
                "train",
                lambda size, own=own, cotangent=cotangent, chunk=chunk: self._gradients(rollout, own, trained, cotangent, len(chunk), size),
                memory_saver(self.recipe, self.policy),
                self.policy,
            )
            sums |= {name: value.sum() for name, value in logged.items()}
            made.make(sums, len(chunk))
        self.policy.average("old", 0.0)
        own_metrics = made.metrics(self.recipe.optimizer.steps_per_rollout)
        return metrics | own_metrics | {"skipped_updates": skipped + own_metrics["skipped_updates"]}

    def _last_step(self, rollout: ScoredRollout, path: Trajectory, finished: Samples, own: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """dL / dv [n, ...] of the last step of the images `own`, and metrics [n]; x0_hat = x - sigma v, so it is -sigma dL / dx0_hat."""
        o = self.settings
        device = rollout.x0.device
        sigma = self._sigmas()[-2].to(device)
        there = own.to(device)
        x0 = rollout.x0[there]
        if len(own) and not self.policy.same_version("old", "current"):
            x0 = self._finished(path.states[own, -1].to(device), sigma, rollout, own)
        pull, metrics = torch.zeros_like(x0), {}
        if self.fake:
            g, metrics = self.fake.gradient(replace(finished.select(own), x_s=x0))
            pull = o.matching * g / math.prod(g.shape[1:])
        if o.backprop:
            with self._followed.at_hand():
                value, gradient = self._followed.gradient(x0, [rollout.prompts[k] for k in own.tolist()], o.margin)
            pull, metrics = pull - o.backprop_scale * gradient, metrics | {"backprop_reward": value}
        return -sigma * pull, metrics

    @torch.no_grad()
    def _finished(self, x: Tensor, sigma: Tensor, rollout: ScoredRollout, own: Tensor) -> Tensor:
        """x0_hat of the present weights, which earlier updates of this rollout have moved."""
        given = rollout.conditioning.select(own)

        def run(size: int) -> Tensor:
            v = [self.policy.velocity("current", x[rows.to(x.device)], sigma, given.select(rows)) for rows in parts(len(own), size)]
            return predict_x0(x, torch.cat(v), sigma)

        return self.micro_batch.run_with_backoff("sample", run, counter=self.policy)

    def _sigmas(self) -> Tensor:
        return self.policy.model.levels(self.recipe.rollout.steps)

    def _gradients(
        self, rollout: ScoredRollout, own: Tensor, trained: Sequence[int], cotangent: Tensor, number: int, size: int
    ) -> dict[str, Tensor]:
        """Puts this rank's part of the gradient of the mean over the rows of `number` images into .grad; returns sums of metrics."""
        assert rollout.path is not None
        device, sigmas, steps = rollout.x0.device, self._sigmas(), self.recipe.rollout.steps
        of = number * (len(trained) + 1)
        sums = {name: torch.zeros((), device=device) for name in ("loss", "ratio_off")}
        self.update.clear()
        image = own.repeat_interleave(len(trained))
        which = torch.tensor(trained).repeat(len(own))
        for rows in parts(len(image), size):
            loss, off = self._policy_gradient(rollout, rollout.path, image[rows], which[rows], sigmas)
            (loss.sum() / of).backward()
            sums["loss"] += loss.detach().sum() / len(trained)
            sums["ratio_off"] += off.sum() / len(trained)
        last = rollout.path.states[own, -1]
        for rows in parts(len(own), size):
            v = self.policy.velocity("current", last[rows].to(device), sigmas[steps - 1].to(device), rollout.conditioning.select(own[rows]))
            (surrogate(v, cotangent[rows.to(device)]).sum() / of).backward()
        return sums

    def _policy_gradient(
        self, rollout: ScoredRollout, path: Trajectory, image: Tensor, step: Tensor, sigmas: Tensor
    ) -> tuple[Tensor, Tensor]:
        """SubGRPO's loss [n] at stored steps, and |ratio - 1| [n]; log p is -mean (x' - mu)^2, without its 1 / (2 std^2)."""
        o, device = self.settings, rollout.x0.device
        x, x_next = path.states[image, step].to(device), path.states[image, step + 1].to(device)
        s, s_next = sigmas[step].to(device), sigmas[step + 1].to(device)
        v = self.policy.velocity("current", x, s, rollout.conditioning.select(image))
        _, mean, _ = sde_step(x, v, s, s_next, torch.zeros_like(x), "cps", self.recipe.rollout.cps_eta())
        new = _log_prob(x_next, mean)
        # as stored it went through other batches: with equal weights the ratio is 1, not nearly 1
        old = new.detach() if self.policy.same_version("old", "current") else _log_prob(x_next, path.means[image, step].to(device))
        advantages = rollout.advantages[image.to(device)].clamp(-o.advantage_clip, o.advantage_clip)
        return grpo_loss(new, old, advantages, o.clip_range), ((new - old).detach().exp() - 1).abs()


def _log_prob(x_next: Tensor, mean: Tensor) -> Tensor:
    return -(x_next - mean).square().flatten(1).mean(1)
