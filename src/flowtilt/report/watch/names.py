"""What runs are called among others."""

from collections.abc import Sequence
from pathlib import Path


def names_of(folders: Sequence[Path]) -> list[str]:
    """The last part of each folder's path, with as many parts before it as tell it from the others."""
    parts = [folder.resolve().parts for folder in folders]
    longest = max(map(len, parts), default=1)
    for length in range(1, longest + 1):
        names = ["/".join(one[-length:]) for one in parts]
        if len(set(names)) == len(set(parts)):
            return names
    return list(map(str, folders))
