"""Rewards as they are named on a command line: "pickscore,ocr", "mine.py:brightness", "geneval=http://host:8765", "all"."""

import inspect
from collections.abc import Sequence
from typing import Any
from urllib.parse import urlsplit

import torch

from flowtilt.errors import UserError
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
            source = word
            name = urlsplit(word).path.rpartition("/")[2] if "://" in word else word.rpartition(":")[2]
        if not name or "/" in name:
            raise UserError(f"rewards: {word!r} needs a name, as in geneval={source}")
        if compat and "://" in source:
            raise UserError(f"rewards: {name} is a server's; start that with --compat")
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
