"""Rewards as they are named on a command line: "pickscore,ocr", "mine.py:brightness", "geneval=http://host:8765", "all"."""

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from flowtilt.config.naming import checked_name, reward_name
from flowtilt.errors import UserError
from flowtilt.rewards import Reward, find_reward, load_reward
from flowtilt.rewards.about import of_paper


@dataclass(frozen=True)
class Named:
    """A reward to load.

    Args:
        name, source, options: see `load_reward`.
        optional: one of "all", which is left out where it can't run.
    """

    name: str
    source: Any
    options: Mapping[str, Any] = field(default_factory=dict)
    optional: bool = False


def parse(words: Sequence[str]) -> list[Named]:
    """The rewards of names, "name=source", "file.py:function" and addresses; "all" is the eight of DiffusionNFT's table.

    Raises:
        UserError: a reward has no name, or two have the same; of "all" one is replaced by another of its name.
    """
    found: dict[str, Named] = {name: Named(name, name, optional=True) for name in of_paper() if "all" in words}
    for word in (word for word in words if word != "all"):
        name, sign, source = word.partition("=")
        name, source = (checked_name(name, word, source), source) if sign else (reward_name(word), word)
        if name in found and not found[name].optional:
            raise UserError(f"rewards: two are called {name}; write another name before one, as in other={source}")
        found[name] = Named(name, source)
    return list(found.values())


def with_compat(named: Named) -> Named:
    """The reward in its `compat` mode, or as it is where it has none.

    Raises:
        UserError: it is a server's, which decides for itself.
    """
    if "://" in named.source:
        raise UserError(f"rewards: {named.name} is a server's; start that with --compat")
    if "compat" not in inspect.signature(find_reward(named.name, named.source)).parameters:
        return named
    return Named(named.name, named.source, {**named.options, "compat": True}, named.optional)


def load_named(
    named: Sequence[Named], *, device: torch.device | str = "cpu", storage_device: torch.device | str | None = None
) -> tuple[dict[str, Reward], dict[str, str]]:
    """Rewards by name, and why each optional one that can't run here is left out.

    Raises:
        UserError: a reward that is not optional can't be loaded, or none can.
    """
    found: dict[str, Reward] = {}
    left_out: dict[str, str] = {}
    for one in named:
        try:
            found[one.name] = load_reward(one.name, one.source, device=device, storage_device=storage_device, options=one.options)
        except UserError as error:
            if not one.optional:
                raise
            left_out[one.name] = str(error)
    if not found:
        raise UserError("rewards: " + ("; ".join(f"{name}: {why}" for name, why in left_out.items()) or "name at least one"))
    return found, left_out
