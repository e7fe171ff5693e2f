"""From a recipe's names to the things they name."""

from collections.abc import Mapping
from pathlib import Path

import torch

from flowtilt.config import NFTSettings, Recipe
from flowtilt.errors import UserError
from flowtilt.models.sd3 import SD3, load_pipeline
from flowtilt.objectives.nft import NFT
from flowtilt.playground import world as playground
from flowtilt.policy import Policy
from flowtilt.prompts import Prompt, load_prompts
from flowtilt.rewards import Reward, load_reward


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
        UserError: the file can't be used, or has fewer prompts than a rollout.
    """
    prompts = _prompts(recipe.prompts, "train")
    if len(prompts) < recipe.rollout.prompts:
        few = f"{len(prompts)} prompts, but a rollout takes {recipe.rollout.prompts}"
        raise UserError(f"prompts {recipe.prompts}: {few}; add prompts or lower rollout.prompts")
    return prompts


def evaluation_prompts(recipe: Recipe, training: list[Prompt]) -> list[Prompt]:
    """The prompts to evaluate on: the recipe's own, else the playground's test split beside its train split, else the training prompts."""
    source = recipe.evaluate.prompts or (recipe.prompts if recipe.prompts == "playground" else None)
    return _prompts(source, "test") if source else training


def _prompts(source: str, split: str) -> list[Prompt]:
    if source == "playground" and not Path(source).exists():
        return playground.prompts("train" if split == "train" else "test")
    return load_prompts(source)


def load_rewards(sources: Mapping[str, str], known: Mapping[str, Reward] | None = None) -> dict[str, Reward]:
    """Rewards by name; one that is `known` already is not loaded again."""
    known = known or {}
    return {name: known[name] if name in known else load_reward(name, source) for name, source in sources.items()}
