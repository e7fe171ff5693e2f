"""Types of options, and lines for a person."""

import argparse
import sys
from typing import Any

from flowtilt.errors import printable

TRUST = "run the Python files and contact the servers that a recipe from elsewhere names (docs/guides/lora.md)"
"""The help of --trust."""
LORA = "a run, a checkpoint, a folder or file, or a hub id (owner/name, owner/name/folder); PATH@64 sets its alpha; several add up"
"""The help of --lora."""


def model_options(command: Any, of: str) -> None:
    """The options that set a key of `[model]`; `of` says what they default to."""
    command.add_argument("--resolution", type=count, metavar="PIXELS", help=f"height and width ({of}, else 512 at most)")
    command.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), help=f"of the network ({of}, else bfloat16 on a GPU)")
    command.add_argument("--t5-length", type=int, metavar="TOKENS", help=f"tokens of SD3's T5 prompt ({of}, else 128)")
    command.add_argument("--levels", choices=("rule", "stock"), help=f"noise levels, stock as published code for SD3 ({of}, else rule)")


def model_keys(args: argparse.Namespace) -> dict[str, Any]:
    """What `model_options` were given."""
    return {key: getattr(args, key) for key in ("resolution", "dtype", "t5_length", "levels")}


def words(text: str) -> list[str]:
    """What stands between commas; something must."""
    found = [word.strip() for word in text.split(",") if word.strip()]
    if not found:
        raise argparse.ArgumentTypeError("names nothing")
    return found


def count(text: str) -> int:
    """A whole number of at least 1."""
    try:
        number = int(text)
    except ValueError:
        number = 0
    if number < 1:
        raise argparse.ArgumentTypeError(f"must be a whole number of at least 1, not {text}")
    return number


def seeds(text: str) -> list[int]:
    """Whole numbers from 0: 3, or 0,1,2, or 0..4 for each from 0 to 4."""
    found: list[int] = []
    for part in words(text):
        first, dots, last = part.partition("..")
        if not (first.isdecimal() and (not dots or (last.isdecimal() and int(first) <= int(last) < int(first) + 1000))):
            raise argparse.ArgumentTypeError(f"must be a number, 0,1,2 or 0..4, not {text}")
        found += range(int(first), int(last) + 1) if dots else [int(first)]
    return list(dict.fromkeys(found))


def say(text: str) -> None:
    """Tells a person what is no result, at once."""
    print(printable(text), file=sys.stderr, flush=True)
