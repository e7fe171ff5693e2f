"""Rewards as they are named on a command line: "pickscore,ocr", "mine.py:brightness", "geneval=http://host:8765", "all"."""

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from flowtilt import weights
from flowtilt.errors import UserError
from flowtilt.files import digest
from flowtilt.rewards import PAPER, Reward, find_reward, load_reward


def parse(named: Sequence[str], *, compat: bool = False) -> list[tuple[str, str, dict[str, Any]]]:
    """Name, source and options of each word; "all" is the eight of DiffusionNFT's table.

    Args:
        named: names, "name=source" or "file.py:function".
        compat: upstream's numbers, of the rewards that have such a mode.
    """
    found = []
    for word in (name for given in named for name in (PAPER if given == "all" else (given,))):
        name, sign, source = word.partition("=")
        if not sign:
            name, source = word.rpartition(":")[2], word
        modes = inspect.signature(find_reward(name, source)).parameters if compat else {}
        found.append((name, source, {"compat": True} if "compat" in modes else {}))
    return found


def load_named(
    named: Sequence[str], *, device: torch.device | str = "cpu", compat: bool = False
) -> tuple[dict[str, Reward], dict[str, str]]:
    """Rewards by name, and why each of "all" that can't run here is left out; see `parse`.

    Raises:
        UserError: a reward that was named itself can't be loaded, or none of "all" can.
    """
    found: dict[str, Reward] = {}
    left_out: dict[str, str] = {}
    for name, source, options in parse(named, compat=compat):
        try:
            found[name] = load_reward(name, source, device=device, options=options)
        except UserError as error:
            if name in named or source != name:
                raise
            left_out[name] = str(error)
    if not found:
        raise UserError("rewards: " + ("; ".join(f"{name}: {why}" for name, why in left_out.items()) or "name at least one"))
    return found, left_out


def versions_of(rewards: Mapping[str, Reward]) -> dict[str, Any]:
    """What a score was made with: a reward's own version, and the SHA-256 of the weights that it reads."""
    found: dict[str, Any] = {}
    for name, reward in rewards.items():
        own = getattr(reward, "version", None)
        found[name] = dict(own) if own else {}
        # a server has told its own; a reward of the user's has none that we know
        if type(reward).__module__ == f"flowtilt.rewards.{name}" or type(reward).__module__.startswith(f"flowtilt.rewards.{name}."):
            found[name] |= {"weights": {key: _fingerprint(key) for key in weights.NEEDED.get(name, ())}}
        if getattr(reward, "compat", False):
            found[name]["compat"] = True
    return found


def _fingerprint(key: str) -> dict[str, str]:
    place = weights.find(key)
    files = (
        [place] if place.is_file() else sorted(place.glob("*.safetensors")) or sorted(place.glob("*.bin")) or sorted(place.glob("vocab*"))
    )
    return {file.name: digest(file) for file in files}
