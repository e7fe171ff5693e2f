"""Whether a recipe that was found, not given, may run code or contact hosts.

A LoRA's folder may hold a recipe.toml of whoever made it. Reading it is safe: it is data. Using it is not, where it names
Python files (an adapter, rewards), servers, or code on the hub. Such parts of a found recipe are refused, unless the user
says `--trust`, or trained the run here: a new run leaves a note in flowtilt's cache, outside of its folder, which a
downloaded folder can't bring along. The note holds for that recipe in that place.
"""

import hashlib
import re
from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from flowtilt.config import ModelSettings, Recipe
from flowtilt.config.given import OBJECT
from flowtilt.errors import UserError
from flowtilt.io.files import cache_folder, shown, write_atomic
from flowtilt.io.run_folder import RunFolder
from flowtilt.methods import is_own

NAME = re.compile(r"[\w.-]+")
"""A built-in reward; "file.py:function" and addresses have a colon. A Python object is never loaded from a recipe."""


def of_model(settings: ModelSettings) -> dict[str, str]:
    """What opening a model runs besides flowtilt's own code, by key."""
    found = {}
    if settings.adapter:
        found["model.adapter"] = settings.adapter
    if settings.attention and "hub" in settings.attention.lower():  # diffusers downloads such a kernel and runs it
        found["model.attention"] = settings.attention
    return found


def of_rewards(rewards: Iterable[tuple[str, str, Mapping[str, Any]]]) -> dict[str, str]:
    """What rewards, as (name, source, options), run or contact besides flowtilt's own code, by key."""
    found = {}
    for name, source, options in rewards:
        if not (NAME.fullmatch(source) or source.startswith(OBJECT)):
            found[f"rewards.{name}"] = source
        for key, value in options.items():
            if isinstance(value, str) and "://" in value:  # UnifiedReward's server
                found[f"rewards.{name}.options.{key}"] = value
    return found


def of_recipe(recipe: Recipe) -> dict[str, str]:
    """What training by a recipe runs or contacts besides flowtilt's own code, by key."""
    rewards = [(name, reward.source or name, reward.options) for name, reward in recipe.reward_table().items()]
    eval_rewards = [
        (name, name, {}) for name in (column.partition("/")[0] for column in recipe.evaluate.rewards) if name not in recipe.rewards
    ]
    method = {"objective.type": recipe.objective.type} if is_own(recipe.objective.type) else {}
    return of_model(recipe.model) | of_rewards([*rewards, *eval_rewards]) | method


def check(run: Path, parts: Mapping[str, str], trust: bool) -> None:
    """Raises UserError where a found recipe would run or contact `parts` and neither the user nor this machine vouches for it.

    Args:
        run: the folder with the recipe.
        trust: the user said so.
    """
    if not parts or trust or is_ours(run):
        return
    key, value = next(iter(parts.items()))
    more = f" and {len(parts) - 1} more" if len(parts) > 1 else ""
    raise UserError(
        f"{shown(RunFolder(run).recipe)}: {key} is {_short(value)}{more}, which runs code or contacts a server, "
        "and this recipe was not made here; read it, then add --trust if you trust it"
    )


def remember(run: Path) -> None:
    """Notes that the recipe in `run` is the user's own. Where the cache can't be written, its parts will need --trust."""
    with suppress(UserError, OSError, RuntimeError):  # RuntimeError: there is no home
        write_atomic(_note(run), _digest(run))


def is_ours(run: Path) -> bool:
    """Whether the recipe in `run` was noted by `remember`, in this place and with this text."""
    with suppress(OSError, RuntimeError):
        return _note(run).read_text() == _digest(run)
    return False


def _note(run: Path) -> Path:
    place = str(run.resolve())
    return cache_folder("FLOWTILT_TRUSTED", "trusted") / hashlib.sha256(place.encode(errors="surrogateescape")).hexdigest()


def _digest(run: Path) -> str:
    return hashlib.sha256((RunFolder(run).recipe).read_bytes()).hexdigest()


def _short(value: str) -> str:
    place, colon, name = value.rpartition(":")
    text = f"{shown(place)}:{name}" if colon and "://" not in value else value
    return text if len(text) <= 200 else f"{text[:200]}…"
