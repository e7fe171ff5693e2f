"""From a recipe's names to the things they name."""

from collections.abc import Mapping, Sequence

import torch

from flowtilt.config import NFTSettings, Recipe
from flowtilt.errors import UserError
from flowtilt.models.sd3 import SD3, load_pipeline
from flowtilt.objectives.nft import NFT
from flowtilt.playground import world as playground
from flowtilt.policy import Policy
from flowtilt.prompts import Prompt, sets
from flowtilt.rewards import Reward, applies, load_reward


def build_policy(recipe: Recipe, device: torch.device) -> Policy:
    """The recipe's model with fresh adapters."""
    m = recipe.model
    pipeline = load_pipeline(m.path, revision=m.revision, dtype=m.dtype, device=device)
    model = SD3(pipeline, t5_length=m.t5_length, resolution=m.resolution)
    return Policy(model, rank=recipe.lora.rank, alpha=recipe.lora.alpha, seed=recipe.seed)


def build_objective(settings: NFTSettings) -> NFT:
    return NFT(**settings.model_dump(exclude={"type", "times", "times_per_image"}))


def training_prompts(recipe: Recipe) -> list[Prompt]:
    """The prompts to train on.

    Raises:
        UserError: the file or set can't be used, or has fewer prompts than a rollout.
    """
    prompts = load_prompts(recipe.prompts, "train")
    if len(prompts) < recipe.rollout.prompts:
        few = f"{len(prompts)} prompts, but a rollout takes {recipe.rollout.prompts}"
        raise UserError(f"prompts {recipe.prompts}: {few}; add prompts or lower rollout.prompts")
    return prompts


def evaluation_prompts(recipe: Recipe, training: list[Prompt]) -> list[Prompt]:
    """The prompts to evaluate on: the recipe's own, else the playground's test split beside its train split, else the training prompts."""
    source = recipe.evaluate.prompts or (recipe.prompts if recipe.prompts == "playground" else None)
    return load_prompts(source, "test") if source else training


def load_prompts(source: str, split: str = "test") -> list[Prompt]:
    """The prompts of a file or a named set; `split` is the playground's."""
    if source == "playground":
        return playground.prompts("train" if split == "train" else "test")
    return sets.load(source)


def training_rewards(recipe: Recipe, device: torch.device) -> dict[str, Reward]:
    """The recipe's `[rewards]`."""
    return {
        name: load_reward(name, settings.source or name, device=device, options=settings.keywords())
        for name, settings in recipe.reward_table().items()
    }


def judging_rewards(recipe: Recipe, trained: Mapping[str, Reward], device: torch.device) -> dict[str, Reward]:
    """The rewards of the recipe's evaluation; one that is trained already is not loaded again."""
    names = dict.fromkeys(column.partition("/")[0] for column in recipe.evaluate.rewards)
    return {name: trained[name] if name in trained else load_reward(name, name, device=device) for name in names} or dict(trained)


def check_prompts(rewards: Mapping[str, Reward], prompts: Sequence[Prompt]) -> None:
    """Raises UserError at the first prompt whose images none of the rewards could judge."""
    for prompt in prompts:
        why = {name: applies(reward, prompt) for name, reward in rewards.items()}
        if all(why.values()):
            reasons = "; ".join(f"{name}: {reason}" for name, reason in why.items())
            raise UserError(f'prompts {prompt.where or "given"}: no reward applies to "{prompt.text}" ({reasons})')
