"""Types of options, and lines for a person."""

import argparse
import sys

from flowtilt.errors import printable

TRUST = "run the Python files and contact the servers that a recipe from elsewhere names (docs/guides/lora.md)"
"""The help of --trust."""


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
