"""Recipes: what a run is, as data. Nothing here imports torch; unknown keys are errors."""

from flowtilt.config.files import load_recipe, recipe_names, to_toml, validate
from flowtilt.config.settings import (
    CPS_ETA,
    EvaluateSettings,
    ModelSettings,
    OptimizerSettings,
    Recipe,
    RewardSettings,
    RolloutSettings,
    known_keys,
)

__all__ = [
    "CPS_ETA",
    "EvaluateSettings",
    "ModelSettings",
    "OptimizerSettings",
    "Recipe",
    "RewardSettings",
    "RolloutSettings",
    "known_keys",
    "load_recipe",
    "recipe_names",
    "to_toml",
    "validate",
]
