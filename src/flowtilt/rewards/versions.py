"""What a score was made with."""

import inspect
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

from flowtilt.io import weights
from flowtilt.io.files import digest
from flowtilt.io.user_code import is_ours
from flowtilt.rewards import BUILT_IN, Reward

_NAMES = {target: name for name, target in BUILT_IN.items()}


def built_in_name(reward: Reward) -> str | None:
    """What a built-in reward is called in recipes, whatever its name in this one; none for a server's or a user's."""
    kind = _kind(reward)
    return _NAMES.get(f"{kind.__module__}:{kind.__qualname__}")


def versions_of(rewards: Mapping[str, Reward]) -> dict[str, dict[str, Any]]:
    """Of each reward what it says of itself (`version`), and the SHA-256 of its weights or, of one from a file, of that file.

    A server has told its own.
    """
    return {name: _version(reward) for name, reward in rewards.items()}


def _kind(reward: Any) -> Any:
    """The function or class."""
    inner = reward.func if isinstance(reward, partial) else reward
    return inner if inspect.isfunction(inner) else type(inner)


def _version(reward: Any) -> dict[str, Any]:
    own = getattr(reward, "version", None)
    found: dict[str, Any] = {} if own is None else {"version": own}
    name, kind = built_in_name(reward), _kind(reward)
    if name:
        found["reward"] = name
        if name in weights.NEEDED:
            found["weights"] = {key: _fingerprint(key) for key in weights.NEEDED[name]}
    elif not is_ours(kind):
        code = getattr(kind if inspect.isfunction(kind) else kind.__call__, "__code__", None)
        place = Path(code.co_filename) if code else None
        if place and place.is_file():
            found["file"], found["sha256"] = place.name, digest(place)
    if getattr(reward, "compat", False):
        found["compat"] = True
    return found


def _fingerprint(name: str) -> dict[str, str]:
    place = weights.find(name)
    files = [place] if place.is_file() else [place / file for file in weights.WEIGHTS[name].files]
    return {file.name: digest(file) for file in files if file.is_file()}
