"""What torchrun's environment says. Imports no torch: a command asks before it loads it."""

import os
from typing import NamedTuple

from flowtilt.errors import UserError

NEEDED = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


class Place(NamedTuple):
    """A process among those of its job: its rank, their number, its rank on this machine."""

    rank: int
    size: int
    local: int


def place() -> Place:
    """Where this process stands; alone without torchrun.

    Raises:
        UserError: variables are missing, or no numbers that fit together.
    """
    size = _number("WORLD_SIZE", 1)
    if size == 1:
        return Place(0, 1, _number("LOCAL_RANK", 0))
    if missing := [name for name in NEEDED if not os.environ.get(name)]:
        raise UserError(
            f"WORLD_SIZE={size} in the environment, but no {' and no '.join(missing)}: start the processes with "
            f"`torchrun --nproc-per-node {size} -m flowtilt …`, or unset WORLD_SIZE to run one"
        )
    rank = _number("RANK", 0)
    if rank >= size:
        raise UserError(f"RANK={rank} in the environment: must be less than WORLD_SIZE, which is {size}; start the processes with torchrun")
    if not 0 < (port := _number("MASTER_PORT", 0)) < 65536:
        raise UserError(f"MASTER_PORT={port} in the environment: must be from 1 to 65535; start the processes with torchrun")
    return Place(rank, size, _number("LOCAL_RANK", 0))


def _number(name: str, default: int) -> int:
    text = os.environ.get(name) or str(default)
    if not (text.isascii() and text.isdigit() and len(text) < 10) or (name == "WORLD_SIZE" and int(text) == 0):
        raise UserError(f"{name}={text} in the environment: must be a whole number; start the processes with torchrun, or unset it")
    return int(text)


def present() -> bool:
    """Whether torchrun has started this process."""
    return "TORCHELASTIC_RUN_ID" in os.environ


def may_restart() -> bool:
    """Whether torchrun starts this job anew where it fails."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")) < int(os.environ.get("TORCHELASTIC_MAX_RESTARTS", "0"))


def interrupted_status() -> int:
    """The exit status of a job that was interrupted: 130, or 0 where torchrun would take that for a failure and start it anew.

    A rank that goes before it has joined the others has 130 always, by which torchrun learns to end them.
    """
    return 0 if may_restart() else 130
