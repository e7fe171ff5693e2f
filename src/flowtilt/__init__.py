"""Online RL for flow-matching image models: bring a diffusers pipeline, prompts and a reward, get a LoRA that diffusers loads.

>>> import flowtilt as ft
>>> ft.Trainer("playground", rollouts=20).run()  # doctest: +SKIP

or rollout by rollout: `for metrics in trainer`; or call by call: `load_policy`, `Policy.sample`, `score`, `group_advantages`,
`Learner`; see `flowtilt.library`.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from flowtilt.io.openmp import wait_asleep
from flowtilt.io.quiet import quieten

if TYPE_CHECKING:
    from flowtilt.advantages import group_advantages
    from flowtilt.config import Recipe, load_recipe
    from flowtilt.errors import UserError
    from flowtilt.library import FullPolicy, Learner, Policy, Samples, load_policy, load_prompts, score
    from flowtilt.objectives.awm import AWM
    from flowtilt.objectives.elbo import EPG, PAR, PEPG
    from flowtilt.objectives.grpo import GRPO
    from flowtilt.objectives.nft import NFT
    from flowtilt.objectives.ram import RAM
    from flowtilt.prompts import Prompt
    from flowtilt.rewards import RewardOutput
    from flowtilt.training.trainer import Trainer

wait_asleep()  # while torch is not loaded yet

__version__ = "0.2.0"
__all__ = [
    "AWM",
    "EPG",
    "GRPO",
    "NFT",
    "PAR",
    "PEPG",
    "RAM",
    "FullPolicy",
    "Learner",
    "Policy",
    "Prompt",
    "Recipe",
    "RewardOutput",
    "Samples",
    "Trainer",
    "UserError",
    "group_advantages",
    "load_policy",
    "load_prompts",
    "load_recipe",
    "score",
]

_FROM = {
    "flowtilt.advantages": ("group_advantages",),
    "flowtilt.config": ("Recipe", "load_recipe"),
    "flowtilt.errors": ("UserError",),
    "flowtilt.library": ("FullPolicy", "Learner", "Policy", "Samples", "load_policy", "load_prompts", "score"),
    "flowtilt.objectives.awm": ("AWM",),
    "flowtilt.objectives.elbo": ("EPG", "PAR", "PEPG"),
    "flowtilt.objectives.grpo": ("GRPO",),
    "flowtilt.objectives.nft": ("NFT",),
    "flowtilt.objectives.ram": ("RAM",),
    "flowtilt.prompts": ("Prompt",),
    "flowtilt.rewards": ("RewardOutput",),
    "flowtilt.training.trainer": ("Trainer",),
}
_HOMES = {name: module for module, names in _FROM.items() for name in names}


def __getattr__(name: str) -> Any:
    # the command line takes signals before it waits for imports, and reads recipes without torch
    if name in _HOMES:
        quieten()
        return getattr(import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'flowtilt' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
