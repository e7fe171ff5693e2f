"""Values that other programs wrote, of lists and tables in one another."""

from typing import Any

from flowtilt.io.user_errors import in_one_line

LARGEST = 100_000
"""Elements and letters of a YAML file, with its repeated parts written out."""
DEEPEST = 100
"""Values within one another; what holds itself is deeper."""


def size(value: Any, most: int) -> int:
    """Letters and elements of a value, each part counted wherever it occurs; more than `most` where it exceeds that or `DEEPEST`."""
    found, rest = 0, [(value, 0)]
    while rest and found <= most:
        one, depth = rest.pop()
        found += len(one) if isinstance(one, str | bytes) else 1
        parts = [*one, *one.values()] if isinstance(one, dict) else one if isinstance(one, list | tuple | set | frozenset) else ()
        if parts and depth == DEEPEST:
            return most + 1
        rest += [(part, depth + 1) for part in parts]
    return found


def load_yaml(text: str) -> Any:
    """The value of a YAML text, read without making objects of its own.

    Raises:
        ValueError: it is none, or larger than `LARGEST`; the message is one line.
    """
    import yaml

    try:
        value = yaml.safe_load(text)
    except Exception as error:  # also of dates, numbers and tags that PyYAML takes for right until it converts them
        raise ValueError(in_one_line(error)) from None
    if size(value, LARGEST) > LARGEST:
        raise ValueError(f"more than {LARGEST:,} values, aliases written out")
    return value
