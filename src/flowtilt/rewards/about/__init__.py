"""The built-in rewards: what each says of itself, without torch. One file each, found in this folder."""

import importlib.util
import os
import pkgutil
from collections.abc import Mapping
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING

from flowtilt.errors import UserError
from flowtilt.io import published
from flowtilt.io.published import Published
from flowtilt.rewards.about.base import Bounds, BuiltIn, Facts, PublishedScore

if TYPE_CHECKING:
    from flowtilt.config import RewardSettings

__all__ = [
    "Bounds",
    "BuiltIn",
    "Facts",
    "PublishedScore",
    "about_column",
    "all_weights",
    "built_in",
    "check_options",
    "download_weights",
    "find_weights",
    "lacking",
    "of_paper",
]


@cache
def built_in() -> dict[str, BuiltIn]:
    """The built-in rewards by name, in alphabetical order."""
    files = [import_module(f"{__name__}.{module.name}") for module in pkgutil.iter_modules(__path__)]
    return {one.name: one for one in sorted((v for file in files for v in vars(file).values() if isinstance(v, BuiltIn)), key=_name)}


def _name(one: BuiltIn) -> str:
    return one.name


def of_paper() -> tuple[str, ...]:
    """The eight of DiffusionNFT's table, in its order; "--rewards all" names them."""
    return tuple(one.name for one in sorted(built_in().values(), key=lambda one: one.paper_place) if one.paper_place)


def check_options(rewards: Mapping[str, "RewardSettings"]) -> None:
    """Raises UserError where a recipe's options of a built-in reward make no sense; loads nothing and asks no server."""
    for name, one in rewards.items():
        about = built_in().get(one.source or name)
        if about and about.check:
            about.check(name, one.options)


def about_column(column: str) -> BuiltIn | None:
    """The built-in reward whose name a column "reward" or "reward/detail" has; none for other rewards."""
    return built_in().get(column.partition("/")[0])


def all_weights() -> dict[str, Published]:
    """Every file that a built-in reward reads, by name."""
    return {entry.name: entry for one in built_in().values() for entry in one.weights}


def find_weights(name: str) -> Path:
    """The file of this name, or the folder where it is several.

    Raises:
        UserError: it is not there; says how to fetch it.
    """
    entry = all_weights()[name]
    readers = [one for one in built_in().values() if entry in one.weights]
    return published.find(entry, min(readers, key=lambda one: len(one.weights)).name)


def lacking(about: BuiltIn) -> str:
    """What a reward needs and does not find here, packages, an address or weights, with what to do; "" where all is here."""
    missing = [package for package in about.packages if importlib.util.find_spec(package) is None]
    if missing:
        return f"{', '.join(missing)} not installed - pip install {' '.join(missing)}"
    if about.variable and not os.environ.get(about.variable):
        return f"{about.variable} is not set"
    try:
        for entry in about.weights:
            find_weights(entry.name)
    except UserError as error:
        return str(error)
    return ""


def download_weights(name: str, to: Path | None = None) -> Path:
    """Fetches the file of this name where it is missing, and checks it either way; see `published.download`."""
    return published.download(all_weights()[name], to)
