"""How often a run calls its network, in closed form; `network_evaluations` of metrics.jsonl counts the same."""

import math

from flowtilt.config import Recipe
from flowtilt.methods import own
from flowtilt.methods.base import BALANCED_EVERY, Passes, evaluations_per_image, trained_rewards

__all__ = ["Passes", "evaluations_in_all", "evaluations_per_image", "passes_in_all", "passes_of"]


def passes_of(recipe: Recipe, step: int) -> Passes:
    """Of rollout `step`, counted from 1, where every image has a score and every update is made."""
    once = own.passes(recipe.objective, recipe, step)
    return once + _weighing(recipe, once, step) if recipe.combine == "marble" else once


def _weighing(recipe: Recipe, once: Passes, step: int) -> Passes:
    """What weighing the rewards adds where it is due: the first update's rows pass once for each reward, and once for none of them."""
    updates = recipe.optimizer.steps_per_rollout
    if (step - 1) % math.ceil(BALANCED_EVERY / updates):
        return Passes(0, 0, 0, 0)
    images = recipe.rollout.trained()
    number, first = len(trained_rewards(recipe)) + 1, images // updates
    rows = once.pairs * first // images
    # the first update finds the old policy as the rollout before left it: equal to the current one, or not
    old = rows if once.old == once.pairs else 0
    return Passes(sample=0, pairs=number * rows, old=number * old, reference=number * (once.reference * first // images))


def passes_in_all(recipe: Recipe) -> Passes:
    """Of the whole run."""
    total = Passes(0, 0, 0, 0)
    for step in range(1, recipe.rollouts + 1):
        total += passes_of(recipe, step)
    return total


def evaluations_in_all(recipe: Recipe) -> int:
    """How often a run is evaluated: before, every so many rollouts, and after."""
    every = recipe.evaluate.every
    return 1 + (recipe.rollouts // every + (recipe.rollouts % every > 0) if every else 1)
