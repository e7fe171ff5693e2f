"""Which prompts a run is evaluated on, in words."""

import os
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from flowtilt.config import Recipe

SPLIT = ("playground", "playground-search")
"""Sets with prompts of their own for training and for evaluation."""


def is_held_out(prompts: str, evaluate_prompts: str | None) -> bool:
    """Whether a recipe evaluates on other prompts than it trains on; without `evaluate.prompts` only `SPLIT` does."""
    if prompts in SPLIT:
        return True
    return evaluate_prompts is not None and os.path.abspath(evaluate_prompts) != os.path.abspath(prompts)


def score_name(held_out: bool) -> str:
    """What the score of an evaluation is called everywhere."""
    return "held-out score" if held_out else "score on the training prompts"


def score_name_of(recipe: "Recipe") -> str:
    return score_name(is_held_out(recipe.prompts, recipe.evaluate.prompts))
