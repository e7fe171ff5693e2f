"""How often a run calls its network, in closed form; `network_evaluations` of metrics.jsonl counts the same."""

from flowtilt.config import Recipe
from flowtilt.methods.base import Passes, evaluations_per_image

__all__ = ["Passes", "evaluations_in_all", "evaluations_per_image", "passes_in_all", "passes_of"]


def passes_of(recipe: Recipe, step: int) -> Passes:
    """Of rollout `step`, counted from 1, where every image has a score and every update is made."""
    return recipe.objective.passes(recipe, step)


def passes_in_all(recipe: Recipe) -> Passes:
    """Of the whole run."""
    total = Passes(0, 0, 0, 0)
    for step in range(1, recipe.steps + 1):
        total += passes_of(recipe, step)
    return total


def evaluations_in_all(recipe: Recipe) -> int:
    """How often a run is evaluated: before, every so many rollouts, and after."""
    every = recipe.evaluate.every
    return 1 + (recipe.steps // every + (recipe.steps % every > 0) if every else 1)
