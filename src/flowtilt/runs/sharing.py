"""A run's recipe and report as others may see them: without this machine's folders and without the addresses of its servers."""

import os
from html import escape
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from flowtilt.build.inputs import map_paths
from flowtilt.config import Recipe, RewardSettings, load_recipe, to_toml
from flowtilt.io.run_folder import RunFolder
from flowtilt.rewards.about import built_in

ADDRESSES = ("url", "server")
"""Options of built-in rewards that say where their server is."""


def shared_recipe(run: Path) -> str:
    """The recipe as TOML: files by their names, servers as "http://server", no folder of the run."""
    recipe = load_recipe(RunFolder(run).recipe, stored=True)
    rewards = {name: _without_address(name, reward) for name, reward in recipe.rewards.items()}
    return to_toml(_without_folders(recipe.model_copy(update={"run": None, "rewards": rewards})))


def shared_report(run: Path) -> str:
    """The report with that recipe in it."""
    place = RunFolder(run)
    recipe, report = (file.read_text(encoding="utf-8", errors="replace") for file in (place.recipe, place.report))
    return report.replace(escape(recipe), escape(shared_recipe(run)))


def _without_folders(recipe: Recipe) -> Recipe:
    return map_paths(recipe, lambda key, path: os.path.basename(path.rstrip(os.sep)))


def _without_address(name: str, reward: Any) -> Any:
    if isinstance(reward, str) and "://" in reward:
        return _server(reward)
    if not isinstance(reward, RewardSettings):
        return reward
    source = reward.source or name
    if "://" in source:
        return reward.model_copy(update={"source": _server(source)})
    about = built_in().get(source)
    hidden = [key for key in ADDRESSES if about and key in about.service_options]
    return reward.model_copy(update={"options": {key: value for key, value in reward.options.items() if key not in hidden}})


def _server(address: str) -> str:
    return f"http://server{urlsplit(address).path}"
