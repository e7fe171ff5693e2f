"""From a recipe's names to the things they name."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import Any, cast

import torch
from pydantic import ValidationError

from flowtilt.build.inputs import found_again
from flowtilt.config import CPS_ETA, EvaluateSettings, ModelSettings, Recipe, RolloutSettings, load_recipe, recipe_names
from flowtilt.config.held_out import SPLIT
from flowtilt.config.trust import check as check_trust
from flowtilt.device.placement import storage_device
from flowtilt.distributed.world import World
from flowtilt.errors import UserError
from flowtilt.io.containment import contained
from flowtilt.io.run_folder import RunFolder
from flowtilt.lora import Lora
from flowtilt.lora.find import run_of
from flowtilt.lora.fit import check, shapes_of
from flowtilt.lora.stacked import read_onto, read_stack
from flowtilt.methods.base import Method
from flowtilt.models.opening import open_model
from flowtilt.objectives import Objective
from flowtilt.playground import world as playground
from flowtilt.policy.lockstep import Lockstep
from flowtilt.policy.lora import LoraPolicy
from flowtilt.policy.roles import Policy
from flowtilt.policy.spread import SpreadPolicy
from flowtilt.policy.start import load_lora
from flowtilt.policy.whole import WholePolicy
from flowtilt.prompts import Prompt, sets
from flowtilt.rewards import Reward, applicable, applies
from flowtilt.rewards.named import Named, load_named
from flowtilt.sampling.sampler import Sampler


def build_policy(recipe: Recipe, world: World, base_loras: Sequence[Lora] = (), start: bool = True) -> Policy:
    """The recipe's model with what it trains: all weights, or fresh adapters on top of `below`.

    A frozen base, or all trained weights, are spread over the ranks where the recipe says so and there are several.

    Args:
        start: begin with the weights of `lora.init`; a run that goes on has its own.

    Raises:
        UserError: a LoRA belongs to another base, or has layers that are not trained.
    """
    sharded = recipe.shard != "none" and world.size > 1
    model = open_model(recipe.model, world.device, sharded)
    if sharded and getattr(model, "several_passes", False):
        kind = type(model.pipeline).__name__
        raise UserError(f'shard: a {kind} takes captions of unlike length in turn, which ranks can\'t do in step; set shard = "none"')
    for steps in (recipe.rollout.steps, recipe.evaluate.steps):
        model.levels(steps)  # now, not after hours: a family may have no levels for so few
    if recipe.train == "full":
        whole = SpreadPolicy(model, world) if sharded else WholePolicy(model)
        if sharded:
            Lockstep(whole, world)
        return whole
    merge = False if sharded else None  # merged weights would be whole on every rank
    shapes = shapes_of(model.network)
    for lora in base_loras:
        check(lora, shapes)
    policy = LoraPolicy(model, rank=recipe.lora.rank, alpha=recipe.lora.alpha, seed=recipe.seed, merge=merge, base_loras=base_loras)
    if start and recipe.lora.init:
        load_lora(policy, read_onto(recipe.lora.init, base_loras))
    if sharded:
        Lockstep(policy, world)
    return policy


def loras_beneath(places: Sequence[Path | str]) -> list[Lora]:
    """The LoRAs of `lora.on`, or a run's copies of them.

    Raises:
        UserError: one is not there, or can't be read.
    """
    for place in places:
        if (name := Path(place).name) in recipe_names() and not Path(place).exists():
            raise UserError(f"lora.on: there is no {place}; make it with `flowtilt train {name}`, or name another")
    try:
        return read_stack(places)
    except UserError as error:
        raise UserError(f"lora.on: {error}") from None


def build_objective(settings: Method) -> Objective:
    """The method of a recipe's `[objective]`, with its loss."""
    if not settings.objective:
        return cast(Objective, settings)
    return named(settings.objective).model_validate(settings.model_dump(exclude_unset=True))


def named(place: str) -> Any:
    """What a method names as "module:name", imported only now."""
    module, _, name = place.partition(":")
    return getattr(import_module(module), name)


def training_prompts(recipe: Recipe) -> list[Prompt]:
    """The prompts to train on.

    Raises:
        UserError: the file or set can't be used, or has fewer prompts than a rollout.
    """
    prompts = load_prompts(recipe.prompts, "train")
    if recipe.objective.samples and len(prompts) < recipe.rollout.prompts:
        few = f"{len(prompts)} prompts, but a rollout takes {recipe.rollout.prompts}"
        raise UserError(f"prompts {recipe.prompts}: {few}; add prompts or lower rollout.prompts")
    return prompts


def evaluation_prompts(recipe: Recipe, training: list[Prompt]) -> list[Prompt]:
    """The prompts to evaluate on: the recipe's own, else the playground's other split, else the training prompts."""
    source = recipe.evaluate.prompts or (recipe.prompts if recipe.prompts in SPLIT else None)
    return load_prompts(source, "test") if source else training


def load_prompts(source: str, split: str = "test") -> list[Prompt]:
    """The prompts of a file or a named set; `split`, "train" or "test", is the playground's, whose search is judged by its validation."""
    if source == "playground-search":
        return playground.search_prompts("train" if split == "train" else "validation")
    if source == "playground":
        return playground.prompts("train" if split == "train" else "test")
    return sets.load(source)


def rewards_of(recipe: Recipe) -> list[Named]:
    """The recipe's `[rewards]`."""
    return [Named(name, settings.source or name, settings.keywords()) for name, settings in recipe.reward_table().items()]


def judges_of(recipe: Recipe) -> list[Named]:
    """The rewards of the recipe's evaluation; one that is trained, too, is the same one."""
    trained = {one.name: one for one in rewards_of(recipe)}
    names = dict.fromkeys(column.partition("/")[0] for column in recipe.evaluate.rewards)
    return [trained.get(name, Named(name, name)) for name in names] or list(trained.values())


def load_rewards(
    recipe: Recipe, device: torch.device, objects: Mapping[str, Reward] | None = None
) -> tuple[dict[str, Reward], dict[str, Reward]]:
    """The rewards that train and those that judge; what does both is loaded once, and off the device where models only visit it.

    Args:
        objects: rewards that Python gave, by name; they are used in place of what the recipe names.
    """
    away = storage_device(recipe.model.offload, device)
    given = objects or {}
    wanted = [replace(one, source=given[one.name]) if one.name in given else one for one in rewards_of(recipe)]
    trained, _ = load_named(wanted, device=device, storage_device=away)
    only = [one for one in judges_of(recipe) if one.name not in trained]
    others = load_named(only, device=device, storage_device=away)[0] if only else {}
    return trained, {one.name: (trained | others)[one.name] for one in judges_of(recipe)}


def check_prompts(rewards: Mapping[str, Reward], prompts: Sequence[Prompt]) -> None:
    """Raises UserError at the first prompt whose images none of the rewards could judge, or a reward that judges no prompt's."""
    with contained("rewards"):
        for prompt in prompts:
            why = {name: applies(reward, prompt) for name, reward in rewards.items()}
            if all(why.values()):
                reasons = "; ".join(f"{name}: {reason}" for name, reason in why.items())
                raise UserError(f'prompts {prompt.where or "given"}: no reward applies to "{prompt.text}" ({reasons})')
    for name, why in applicable(prompts, rewards)[1].items():
        raise UserError(f"rewards.{name}: applies to none of the prompts ({why}); give it the weight 0, or prompts that it can judge")


def recipe_of(place: Path) -> Recipe | None:
    """The recipe of the run that a LoRA lies in, none for one from elsewhere; to be read, not to be run: see `vouch`."""
    run = run_of(place)
    return found_again(load_recipe(RunFolder(run).recipe, stored=True), run) if run else None


def vouch(place: Path, parts: Mapping[str, str], given: bool) -> None:
    """Raises UserError where `parts` of the recipe of `recipe_of` may not be run; see `trust.check`.

    Args:
        given: the user trusts them.
    """
    if run := run_of(place):
        check_trust(run, parts, given)


def model_settings(path: str | None, recipe: Recipe | None, **given: Any) -> ModelSettings:
    """The model of that path (none is the recipe's own, else the playground), otherwise as in the recipe of its LoRA.

    Args:
        given: keys of `[model]` in place of the recipe's; those that are none are left out.

    Raises:
        UserError: a value that the key does not take.
    """
    settings = recipe.model if recipe else ModelSettings(path="playground")
    changed = {key: value for key, value in given.items() if value is not None}
    if path not in (None, settings.path):
        changed |= {"path": path, "revision": None}
    try:
        return ModelSettings.model_validate({**settings.model_dump(), **changed}) if changed else settings
    except ValidationError as error:
        first = error.errors()[0]
        raise UserError(f"model.{'.'.join(map(str, first['loc']))}: {first['msg']}") from None


EVALUATED_AT = 512
"""Pixels at which a model without a recipe is evaluated, as published, where its own resolution is larger."""


def default_evaluation(path: str | None) -> EvaluateSettings:
    """How a model without a recipe is evaluated: the playground as its recipe says, any other as DiffusionNFT does."""
    return load_recipe("playground").evaluate if path in (None, "playground") else EvaluateSettings()


def sampler_of(
    settings: RolloutSettings | EvaluateSettings,
    *,
    solver: str | None = None,
    steps: int | None = None,
    guidance: float | None = None,
    eta: float | None = None,
) -> Sampler:
    """The sampler of a recipe's rollout or evaluation; what is said besides takes the place of its settings.

    Raises:
        UserError: an eta that the solver does not have, or outside (0, 1].
    """
    solver = solver or settings.solver
    if eta is None and solver == "cps":
        eta = CPS_ETA if settings.eta is None else settings.eta
    try:
        return Sampler(solver, steps or settings.steps, settings.guidance if guidance is None else guidance, eta)
    except ValueError as error:
        raise UserError(str(error)) from None
