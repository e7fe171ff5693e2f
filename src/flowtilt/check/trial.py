"""The steps that load and compute: sample, score, one step of training, and the LoRA in stock diffusers."""

import gc
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from flowtilt.build import build_policy, load_rewards, loras_beneath, named, sampler_of
from flowtilt.check.hours import visit_apart
from flowtilt.check.round_trip import Trained, compared, set_apart
from flowtilt.config import Recipe, RewardSettings
from flowtilt.device.micro_batch import MicroBatch
from flowtilt.distributed.world import World
from flowtilt.errors import UserError
from flowtilt.evaluate import generate, spread
from flowtilt.methods.base import trained_rewards
from flowtilt.policy.compiling import compile_blocks
from flowtilt.prompts import Prompt, PromptWalk
from flowtilt.rewards import Reward
from flowtilt.rewards.facts import facts_of
from flowtilt.rewards.judging import judge
from flowtilt.training.parts import Parts, Training
from flowtilt.training.timing import Phases

PROMPTS, IMAGES = 2, 4
"""Prompts of the step that is tried, and images of each."""
QUICK = 5.0
"""Seconds below which a part is timed a second time, as on a GPU always: the first call also sets things up."""
COPIES = 5
"""Of the two images that are scored, by which a reward is timed."""
SPREAD = "flowtilt_check"
"""A reward of the trial alone, so that images of a prompt differ and something is trained."""


def brightness(images: Tensor, prompts: list[Prompt]) -> Tensor:
    """The mean of each image."""
    return images.mean((1, 2, 3))


def small(recipe: Recipe) -> Recipe:
    """The recipe with a rollout of a few images and one update."""
    r = recipe.rollout
    images = min(r.images_per_prompt, IMAGES)
    few = {"prompts": min(r.prompts, PROMPTS), "images_per_prompt": images}
    if r.train_per_prompt:
        few["train_per_prompt"] = min(r.train_per_prompt, images)
    changed: dict[str, object] = {
        "rollout": r.model_copy(update=few),
        "optimizer": recipe.optimizer.model_copy(update={"steps_per_rollout": 1}),
    }
    if recipe.objective.samples and trained_rewards(recipe):
        changed["rewards"] = {**recipe.rewards, SPREAD: RewardSettings(source=SPREAD, weight=1.0)}
    return recipe.model_copy(update=changed)


class Trial:
    """A recipe's parts, loaded once and used step by step.

    Args:
        train, test: prompts.
    """

    def __init__(self, recipe: Recipe, world: World, train: Sequence[Prompt], test: Sequence[Prompt]):
        self.recipe, self.world = recipe, world
        self._train, self._test = train, test
        self._rows = spread(test, PROMPTS) if test else []
        self.seconds: dict[str, float] = {}
        """Of the step that was tried, by phase; "evaluate" and "judge" per image; "visit", of reward models that come to work."""

    def load_rewards(self) -> str:
        """Loads every reward."""
        begin = time.perf_counter()
        self._rewards, self._eval_rewards = load_rewards(self.recipe, self.world.device)
        return f"{', '.join({**self._rewards, **self._eval_rewards})} in {time.perf_counter() - begin:.1f} s"

    def load_model(self) -> str:
        """Loads the model and what is trained on it."""
        begin = time.perf_counter()
        self._below = loras_beneath(self.recipe.lora.on)
        self._policy = build_policy(self.recipe, self.world, self._below)
        if self.recipe.model.recompute is True:
            self._policy.recompute()
        self.micro_batch = MicroBatch(self.recipe.micro_batch, self.world.device.type)
        network = self._policy.model.network
        number = sum(x.numel() for x in self._policy.parameters)
        dtype = str(network.dtype).removeprefix("torch.")
        return f"{type(network).__name__} in {dtype}, {number / 1e6:.1f} million weights trained, {time.perf_counter() - begin:.1f} s"

    def sample(self) -> str:
        """Samples two prompts as the recipe's evaluation does."""
        sampler, model = sampler_of(self.recipe.evaluate), self._policy.model
        prompts, each = [self._test[index] for index, _ in self._rows], 0.0
        for _ in range(2):
            begin = time.perf_counter()
            self._images = generate(self._policy, "ema", self._test, self._rows, sampler, self.recipe.seed, self.micro_batch)
            each = (time.perf_counter() - begin) / len(prompts)
            if not self._again(each * len(prompts)):
                break
        self.seconds["evaluate"] = each
        if not self._images.isfinite().all():
            raise UserError('an image is not finite; set model.dtype = "bfloat16" or "float32"')
        if float(self._images.std()) < 1e-3:
            raise UserError("an image is one flat colour; is model.path a pipeline with trained weights?")
        guidance = f", guidance {sampler.guidance:g}" if sampler.guidance != 1 else ", no guidance"
        size = f"{model.resolution} px, {sampler.steps} {sampler.solver} steps{guidance}"
        return f"{len(prompts)} images of {size}: {each:.2f} s per image"

    def score(self) -> str:
        """Scores the two images with every reward."""
        prompts, rewards = [self._test[index] for index, _ in self._rows], self._eval_rewards | self._rewards
        scores, notes, spent = self._judged(rewards, prompts)
        here = {name: reward for name, reward in rewards.items() if not facts_of(name, reward).off_device}
        self.seconds["judge"], self.seconds["visit"] = spent / len(prompts), 0.0
        if here and self._again(spent):
            few, many = self._judged(here, prompts)[2], self._judged(here, prompts, COPIES)[2]
            each, self.seconds["visit"] = visit_apart(few, many, len(prompts), COPIES * len(prompts))
            # the first call also sets things up; what rewards elsewhere took is a part of the rest
            self.seconds["judge"] = each + (max(spent - few, 0.0) / len(prompts) if len(here) < len(rewards) else 0.0)
        if silent := [name for name in rewards if scores[name].isnan().all()]:
            why = f" ({next(filter(None, notes))})" if any(notes) else ""
            raise UserError(f"reward {silent[0]}: no score for either image{why}; do its prompts fit it?")
        return "; ".join(f"{name} {', '.join(f'{value:.3f}' for value in values.tolist())}" for name, values in scores.items())

    def _again(self, seconds: float) -> bool:
        return self.world.device.type == "cuda" or seconds < QUICK

    def _judged(self, rewards: Mapping[str, Reward], prompts: list[Prompt], copies: int = 1) -> tuple[dict[str, Tensor], list[str], float]:
        """Scores and notes of so many copies of the images, and the seconds that they took."""
        begin = time.perf_counter()
        scores, notes = judge(rewards, self._images.repeat(copies, 1, 1, 1), prompts * copies, self.world.device)
        return scores, notes, time.perf_counter() - begin

    def train(self) -> str:
        """One step of training on a few images: rollout, loss, backward, update."""
        recipe = small(self.recipe)
        walk = PromptWalk(self._train, recipe.seed, {} if recipe.tags == "auto" else recipe.tags)
        rewards = {**self._rewards, **({SPREAD: brightness} if SPREAD in recipe.rewards else {})}
        parts = Parts(recipe, self._policy, walk, rewards, self.world, self.micro_batch)
        method: Training = named(recipe.objective.learner)(parts)
        if recipe.model.compile and (why := compile_blocks(self._policy)):
            raise UserError(f"model.compile: the blocks can't be compiled ({why}); set it to false")
        cuda, metrics = self.world.device.type == "cuda", dict[str, float]()
        for step in (1, 2):
            phases = Phases(self.world.device)
            metrics = method.step(step, phases)
            total, seconds = phases.finish()
            self.seconds |= seconds
            if not self._again(total):
                break
        norm = metrics.get("grad_norm", float("nan"))
        if not 0 < norm < float("inf"):
            raise UserError(f'the gradient is {norm:g}, so nothing would be trained; set model.dtype = "float32" to see whether it is that')
        peak = f", peak {torch.cuda.max_memory_allocated(self.world.device) / 2**30:.1f} GiB" if cuda else ""
        sizes = ", ".join(f"{kind} {size}" for kind, size in self.micro_batch.sizes.items())
        return f"{method.images} images, gradient {norm:.3g}{f', at once: {sizes}' if sizes else ''}{peak}"

    def round_trip(self) -> str:
        """Saves what is trained, loads it in stock diffusers, and compares an image; the trial's model is gone afterwards."""
        with tempfile.TemporaryDirectory(prefix="flowtilt-check-") as folder:
            saved: Trained = set_apart(self._policy, self.recipe, self._below, Path(folder))
            del self._policy
            gc.collect()
            if self.world.device.type == "cuda":
                torch.cuda.empty_cache()
            return compared(saved, self.world.device)
