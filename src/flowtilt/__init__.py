"""Tilts a flow-matching image generator toward rewards.

>>> from flowtilt import Trainer, load_recipe
>>> Trainer(load_recipe("playground", ["steps=20"])).run()  # doctest: +SKIP
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from flowtilt.io.openmp import wait_asleep

if TYPE_CHECKING:
    from flowtilt.config import Recipe, load_recipe
    from flowtilt.errors import UserError
    from flowtilt.prompts import Prompt
    from flowtilt.rewards import RewardOutput
    from flowtilt.training.trainer import Trainer

wait_asleep()  # while torch is not loaded yet

__version__ = "0.1.0"
__all__ = ["Prompt", "Recipe", "RewardOutput", "Trainer", "UserError", "load_recipe"]

_FROM = {
    "Prompt": "flowtilt.prompts",
    "Recipe": "flowtilt.config",
    "RewardOutput": "flowtilt.rewards",
    "Trainer": "flowtilt.training.trainer",
    "UserError": "flowtilt.errors",
    "load_recipe": "flowtilt.config",
}


def __getattr__(name: str) -> Any:
    # the command line takes signals before it waits for imports, and reads recipes without torch
    if name in _FROM:
        return getattr(import_module(_FROM[name]), name)
    raise AttributeError(f"module 'flowtilt' has no attribute {name!r}")
