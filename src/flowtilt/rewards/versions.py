"""What a score was made with."""

import inspect
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from flowtilt.io.files import digest
from flowtilt.io.published import Published
from flowtilt.io.user_code import is_ours
from flowtilt.rewards import Reward
from flowtilt.rewards.about import built_in, find_weights
from flowtilt.rewards.facts import built_in_name, kind_of


def versions_of(rewards: Mapping[str, Reward]) -> dict[str, dict[str, Any]]:
    """Of each reward what it says of itself (`version`), and the SHA-256 of its weights or, of one from a file, of that file.

    A server has told its own.
    """
    return {name: _version(reward) for name, reward in rewards.items()}


def _version(reward: Any) -> dict[str, Any]:
    own = getattr(reward, "version", None)
    found: dict[str, Any] = {} if own is None else {"version": own}
    name, kind = built_in_name(reward), kind_of(reward)
    if name:
        found["reward"] = name
        if built_in()[name].weights:
            found["weights"] = {entry.name: _fingerprint(entry) for entry in built_in()[name].weights}
    elif not is_ours(kind):
        code = getattr(kind if inspect.isfunction(kind) else kind.__call__, "__code__", None)
        place = Path(code.co_filename) if code else None
        if place and place.is_file():
            found["file"], found["sha256"] = place.name, digest(place)
    if getattr(reward, "compat", False):
        found["compat"] = True
    return found


def _fingerprint(entry: Published) -> dict[str, str]:
    place = find_weights(entry.name)
    files = [place] if place.is_file() else [place / file for file in entry.files]
    return {file.name: digest(file) for file in files if file.is_file()}
