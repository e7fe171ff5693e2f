"""flowtilt in a notebook or a script: load, sample, score, train, save, each by one call.

>>> import flowtilt as ft
>>> policy = ft.load_policy("playground", lora_rank=32)
>>> prompts = ft.load_prompts("playground")[:8]
>>> learner = ft.Learner(policy, ft.NFT(beta=1.0), lr=3e-3)
>>> for step in range(30):  # doctest: +SKIP
...     batch = policy.sample(prompts, images_per_prompt=8, seed=step)
...     scores = ft.score({"red": lambda images, prompts: images[:, 0].mean((1, 2))}, batch)
...     print(learner.step(batch, ft.group_advantages(scores["red"], batch.groups)))
>>> policy.save_lora("mine")  # doctest: +SKIP
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, overload

import torch
from PIL import Image as Picture
from pydantic import ValidationError
from torch import Tensor

from flowtilt import build
from flowtilt.advantages import flat_groups
from flowtilt.build import build_objective, default_evaluation
from flowtilt.config import ModelSettings, OptimizerSettings, RolloutSettings
from flowtilt.device.micro_batch import MicroBatch
from flowtilt.distributed.world import World
from flowtilt.errors import UserError
from flowtilt.io.images import sheet
from flowtilt.io.showing import Showable
from flowtilt.lora.stacked import read_stack
from flowtilt.methods.base import Method
from flowtilt.models.conditioning import Conditioning
from flowtilt.models.editing import check_sources
from flowtilt.models.opening import open_model
from flowtilt.policy import roles
from flowtilt.policy.lora import LoraPolicy
from flowtilt.policy.whole import WholePolicy
from flowtilt.prompts import Prompt
from flowtilt.rewards import Reward, load_reward
from flowtilt.rewards.judging import judge
from flowtilt.sampling.sampler import decode
from flowtilt.sampling.trajectory import Trajectory
from flowtilt.seeding import noise
from flowtilt.training import learner as training
from flowtilt.training.collector import collector
from flowtilt.training.scored import ScoredRollout
from flowtilt.training.timing import Phases

__all__ = ["FullPolicy", "Learner", "Policy", "Samples", "load_policy", "load_prompts", "score"]


@dataclass(frozen=True)
class Samples(Showable):
    """Images of a policy, prompt by prompt.

    Args:
        images: [N, 3, H, W] fp32 in [0, 1], on the CPU.
        latents: x0 [N, ...] fp32, on the policy's device.
        prompts: of each image, N.
        groups: [N] integers, equal for the images of one prompt.
        conditioning: what the network read of each prompt.
        settings: how they were sampled.
        seed: of their noise.
        path: the stochastic steps that were kept for training, if any.
    """

    images: Tensor = field(repr=False)
    latents: Tensor = field(repr=False)
    prompts: list[Prompt] = field(repr=False)
    groups: Tensor = field(repr=False)
    conditioning: Conditioning = field(repr=False)
    settings: RolloutSettings
    seed: int
    path: Trajectory | None = field(default=None, repr=False)

    def __len__(self) -> int:
        return len(self.images)

    def picture(self) -> Picture.Image:
        """All images, one row per prompt; small ones are enlarged."""
        return sheet(self.images.unflatten(0, (-1, self.settings.images_per_prompt)).unbind(1))


class Sampling(roles.Policy):
    """A pipeline to train, in the roles "current" (trained), "old" (samples) and "ema" (the average, saved)."""

    world: World
    micro_batch: MicroBatch
    defaults: RolloutSettings
    """Solver, steps and guidance of `sample` without options."""
    learner: "Learner | None" = None
    """The learner that trains it; a policy has one at a time."""

    @torch.no_grad()
    def sample(
        self,
        prompts: str | Prompt | Sequence[str | Prompt],
        images_per_prompt: int = 1,
        *,
        solver: str | None = None,
        steps: int | None = None,
        guidance: float | None = None,
        eta: float | None = None,
        seed: int = 0,
        role: str = "old",
        keep: Method | None = None,
    ) -> Samples:
        """Images of each prompt, from noise that depends on the seed and on the image's place alone.

        Args:
            prompts: captions.
            solver, steps, guidance, eta: as in a recipe's `[rollout]`; None takes `defaults`.
            role: whose weights: "old" (the policy that collects), "current", "ema", "reference".
            keep: the method that is to be trained on these images, if it trains a rollout's own steps, such as GRPO.

        Raises:
            UserError: no prompts, an unknown role or solver, or a number out of range.
        """
        texts = [prompts] if isinstance(prompts, (str, Prompt)) else list(prompts)
        if not texts:
            raise UserError("sample: no prompts; give at least one caption")
        given = {"solver": solver, "steps": steps, "guidance": guidance, "eta": eta}
        said = {name: value for name, value in given.items() if value is not None}
        if solver not in (None, self.defaults.solver) and eta is None:
            said["eta"] = None
        try:
            settings = RolloutSettings(
                **{**self.defaults.model_dump(), **said, "prompts": len(texts), "images_per_prompt": images_per_prompt}
            )
            collect = collector(settings, seed, 1 + (self.learner.steps if self.learner else 0), keep and build_objective(keep), role)
        except (ValidationError, ValueError) as error:
            raise UserError(f"sample: {_first(error)}") from None
        each = [Prompt(text) if isinstance(text, str) else text for text in texts for _ in range(images_per_prompt)]
        check_sources(self.model, each)
        where = [(1, p, k) for p in range(len(texts)) for k in range(images_per_prompt)]
        start = noise(seed, "rollout", where, self.model.latent_shape).to(self.model.device)
        conditioning = self.model.encode([prompt.caption for prompt in each])
        latents, path = self.micro_batch.run_with_backoff(
            "sample", lambda size: collect(self, start, conditioning, where, size), counter=self
        )
        images = self.micro_batch.run_with_backoff("decode", lambda size: decode(self, latents, size))
        groups = torch.arange(len(texts)).repeat_interleave(images_per_prompt)
        return Samples(images, latents, each, groups, conditioning, settings, seed, path)


class Policy(Sampling, LoraPolicy):
    """A pipeline with a LoRA to train, in the roles "current" (trained), "old" (samples) and "ema" (the average, saved)."""


class FullPolicy(Sampling, WholePolicy):
    """A pipeline all of whose network's weights are trained, in the same roles; `save` writes the network's folder."""


@overload
def load_policy(
    model: str = "playground",
    *,
    train: Literal["lora"] = "lora",
    lora_rank: int = 32,
    lora_alpha: float | None = None,
    base_loras: Sequence[str | Path] = (),
    seed: int = 0,
    device: str | torch.device | None = None,
    micro_batch: int | str = "auto",
    **settings: Any,
) -> Policy: ...


@overload
def load_policy(
    model: str = "playground",
    *,
    train: Literal["full"],
    device: str | torch.device | None = None,
    micro_batch: int | str = "auto",
    **settings: Any,
) -> FullPolicy: ...


def load_policy(
    model: str = "playground",
    *,
    train: Literal["lora", "full"] = "lora",
    lora_rank: int = 32,
    lora_alpha: float | None = None,
    base_loras: Sequence[str | Path] = (),
    seed: int = 0,
    device: str | torch.device | None = None,
    micro_batch: int | str = "auto",
    **settings: Any,
) -> Policy | FullPolicy:
    """A diffusers pipeline with a fresh LoRA, which samples what the base samples until it is trained.

    Args:
        model: a folder, a hub id, or "playground".
        train: "full" trains all weights of the network instead; the LoRA's arguments are then without effect.
        lora_alpha: None is twice the rank.
        base_loras: frozen LoRAs on which the trained one is put, as in `lora.on`.
        seed: of the LoRA's start.
        device: None is the first GPU, or the CPU.
        micro_batch: images that pass the network at once; never changes the result.
        settings: further keys of a recipe's `[model]`: dtype, resolution, t5_length, adapter, options, ...

    Raises:
        UserError: the model can't be loaded, or a setting is wrong.
    """
    where = torch.device(device) if device else torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        wanted = ModelSettings(path=model, **settings)
    except ValidationError as error:
        raise UserError(f"load_policy: {_first(error)}") from None
    opened = open_model(wanted, where)
    if train == "full":
        if base_loras or wanted.quantize:
            name = "base_loras" if base_loras else "quantize"
            raise UserError(f'load_policy: {name} is for a trained LoRA; leave it out with train="full"')
        policy = FullPolicy(opened)
    elif train == "lora":
        alpha = 2.0 * lora_rank if lora_alpha is None else lora_alpha
        policy = Policy(opened, rank=lora_rank, alpha=alpha, seed=seed, base_loras=read_stack(base_loras))
    else:
        raise UserError(f'load_policy: train must be "lora" or "full", not {train!r}')
    e = default_evaluation(model)
    policy.world = World(0, 1, where)
    policy.micro_batch = MicroBatch(micro_batch, where.type)
    policy.defaults = RolloutSettings(solver=e.solver, steps=e.steps, guidance=e.guidance, eta=e.eta)
    return policy


def load_prompts(source: str, split: str = "train") -> list[Prompt]:
    """The prompts of a file (.txt, .csv, .tsv, .jsonl) or of a named set.

    Args:
        split: "train" or "test" of the playground's prompts; other sources have one.

    Raises:
        UserError: no such file or set, or no prompts in it.
    """
    return build.load_prompts(source, split)


def score(
    rewards: str | Reward | Mapping[str, str | Reward], samples: Samples | Tensor, prompts: Sequence[str | Prompt] | None = None
) -> dict[str, Tensor]:
    """Scores [N] fp32 by reward, and by "reward/detail"; NaN where a reward has none.

    Args:
        rewards: name -> reward; a reward is a callable of images [N, 3, H, W] in [0, 1] and N prompts, a built-in name,
            "file.py:function", or a server's address. One alone needs no name.
        samples: images, or what `Policy.sample` returned.
        prompts: of images that come as a tensor.

    Raises:
        UserError: a reward can't be loaded, fails, or returns something else than N numbers.
    """
    images = samples.images if isinstance(samples, Samples) else samples
    given = samples.prompts if isinstance(samples, Samples) and prompts is None else prompts
    if given is None or len(given) != len(images):
        raise UserError(f"score: {0 if given is None else len(given)} prompts for {len(images)} images; give one per image")
    named = rewards if isinstance(rewards, Mapping) else {_name(rewards): rewards}
    loaded = {name: load_reward(name, reward) for name, reward in named.items()}
    return judge(loaded, images, [Prompt(text) if isinstance(text, str) else text for text in given], "cpu")[0]


def _name(reward: str | Reward) -> str:
    if isinstance(reward, str):
        return reward.rpartition(":")[2].rpartition("/")[2] or "reward"
    return getattr(reward, "__name__", type(reward).__name__).strip("<>") or "reward"


class Learner:
    """Trains a policy on scored samples.

    Args:
        policy: what `load_policy` returned; it has one learner at a time.
        objective: a method with its settings: NFT(beta=1.0), GRPO(), your own.
        lr: AdamW's learning rate.
        ema: greatest decay of the average that is saved.
        seed: of training times and noise.
        optimizer: further keys of a recipe's `[optimizer]`: steps_per_rollout, warmup, clip, ...

    Raises:
        UserError: a setting is wrong, the method needs a recipe, or another learner trains this policy.
    """

    def __init__(self, policy: Sampling, objective: Method, lr: float = 3e-4, *, ema: float = 0.9, seed: int = 0, **optimizer: Any):
        if not isinstance(policy, Sampling):
            raise UserError(f"Learner: want a policy of load_policy, not {type(policy).__name__}")
        if not isinstance(objective, Method):
            raise UserError(f"Learner: want a method with its settings, such as NFT(beta=1.0), not {objective!r:.80}")
        if policy.learner is not None:
            raise UserError("Learner: this policy has a learner already; call its close(), or load another policy")
        if objective.learner != Method.learner:
            raise UserError(f"Learner: {objective.type} trains by a recipe only; see flowtilt.Trainer")
        try:
            self._optimizer = OptimizerSettings(lr=lr, **optimizer)
        except ValidationError as error:
            raise UserError(f"Learner: {_first(error)}") from None
        self._policy, self._objective = policy, build_objective(objective)
        self._seed, self._ema = seed, ema
        self._learner: training.Learner | None = None
        self.steps = 0
        """Steps so far."""
        policy.learner = self

    def close(self) -> None:
        """Frees the policy for another learner."""
        if self._policy.learner is self:
            self._policy.learner = None

    def step(self, samples: Samples, advantages: Tensor) -> dict[str, float]:
        """One rollout's optimizer steps; returns mean metrics, such as loss and grad_norm.

        Args:
            samples: of the policy's role "old".
            advantages: [N]; an image with NaN is left out.

        Raises:
            UserError: shapes differ, nothing to train on, the samples lack the steps that the method trains, or this learner is closed.
        """
        if self._policy.learner is not self:
            raise UserError("step: this learner is closed; make another with Learner(policy, ...)")
        if advantages.shape != (len(samples),):
            raise UserError(f"step: advantages are {list(advantages.shape)}, but there are {len(samples)} images; want one per image")
        wants = self._objective.keeps(self.steps, samples.settings, samples.seed) is not None
        if wants != (samples.path is not None):
            how = "sample with keep=objective" if wants else "sample without keep"
            raise UserError(f"step: the method trains {'kept steps' if wants else 'clean samples'}; {how}")
        kept = ~advantages.isnan().cpu()
        if self._objective.drops_flat:
            kept &= ~flat_groups(advantages.cpu(), samples.groups)
        if not bool(kept.any()):
            raise UserError("step: no image has an advantage; every reward was missing, or all images of each prompt score alike")
        policy = self._policy
        learner = self._made(samples.settings)
        self.steps += 1
        advantages = self._objective.prepare(advantages.float().cpu(), samples.groups)
        everything = range(len(samples))
        rollout = ScoredRollout(
            samples.latents, advantages.to(policy.model.device), samples.conditioning, samples.path, everything, kept,
            samples.prompts, samples.groups, advantages,
        )  # fmt: skip
        return learner.learn(self.steps, rollout, Phases(policy.model.device))

    def _made(self, settings: RolloutSettings) -> training.Learner:
        """The learner for rollouts of these settings, whose times or steps are trained; the optimizer stays."""
        if self._learner is None:
            self._objective = _fitted(self._objective, settings)
        most = getattr(self._objective, "times_per_image", 0)
        if getattr(self._objective, "times", "") == "rollout" and most > settings.steps:
            raise UserError(f"step: samples of {settings.steps} solver steps have no {most} noise levels; lower times_per_image")
        if self._learner is None:
            self._learner = training.Learner(
                self._policy,
                self._objective,
                self._optimizer,
                settings,
                seed=self._seed,
                ema=self._ema,
                world=self._policy.world,
                micro_batch=self._policy.micro_batch,
                save_memory=lambda: False,
            )
        self._learner.sampled_by(settings)
        return self._learner


def _fitted(objective: Any, settings: RolloutSettings) -> Any:
    """The objective with as many training times as the samples have noise levels, where the user left the number to its default."""
    most = getattr(objective, "times_per_image", 0)
    if "times_per_image" in objective.model_fields_set or getattr(objective, "times", "") != "rollout" or most <= settings.steps:
        return objective
    return objective.model_copy(update={"times_per_image": settings.steps})


def _first(error: Exception) -> str:
    """What a validation error says first."""
    if isinstance(error, ValidationError):
        one = error.errors()[0]
        return f"{'.'.join(map(str, one['loc']))}: {one['msg']}"
    return str(error)
