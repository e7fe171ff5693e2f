"""What a score was made with."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from flowtilt import weights
from flowtilt.files import digest
from flowtilt.rewards import BUILT_IN, Reward

_NAMES = {target: name for name, target in BUILT_IN.items()}


def versions_of(rewards: Mapping[str, Reward]) -> dict[str, dict[str, Any]]:
    """Of each reward what it says of itself (`version`), and of a built-in one the SHA-256 of the weights that it reads.

    A server has told its own.
    """
    return {name: _version(reward) for name, reward in rewards.items()}


def _version(reward: Reward) -> dict[str, Any]:
    own = getattr(reward, "version", None)
    found: dict[str, Any] = {} if own is None else {"version": own}
    kind = reward if hasattr(reward, "__qualname__") else type(reward)
    built_in = _NAMES.get(f"{kind.__module__}:{getattr(kind, '__qualname__', '')}")
    if built_in:
        found["reward"] = built_in
        if built_in in weights.NEEDED:
            found["weights"] = {name: _fingerprint(name) for name in weights.NEEDED[built_in]}
    if getattr(reward, "compat", False):
        found["compat"] = True
    return found


def _fingerprint(name: str) -> dict[str, str]:
    place = weights.find(name)
    files = [place] if place.is_file() else [place / file for file in weights.WEIGHTS[name].files]
    return {file.name: digest(Path(file)) for file in files if file.is_file()}
