"""Tilts a flow-matching image generator toward rewards.

>>> from flowtilt import Trainer, load_recipe
>>> Trainer(load_recipe("playground", ["steps=20"])).run()  # doctest: +SKIP
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from flowtilt.config import Recipe, load_recipe
from flowtilt.errors import UserError

if TYPE_CHECKING:
    from flowtilt.prompts import Prompt
    from flowtilt.rewards import RewardOutput
    from flowtilt.trainer import Trainer

__version__ = "0.1.0"
__all__ = ["Prompt", "Recipe", "RewardOutput", "Trainer", "UserError", "load_recipe"]

_NEEDS_TORCH = {"Prompt": "flowtilt.prompts", "RewardOutput": "flowtilt.rewards", "Trainer": "flowtilt.trainer"}


def __getattr__(name: str) -> Any:
    # the command line reads recipes without waiting for torch
    if name in _NEEDS_TORCH:
        return getattr(import_module(_NEEDS_TORCH[name]), name)
    raise AttributeError(f"module 'flowtilt' has no attribute {name!r}")
