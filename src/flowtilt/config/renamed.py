"""Keys that had another name in the version before: read for one version more, with a hint."""

import sys
from collections.abc import Iterator
from typing import Any

RENAMED = {"steps": "rollouts"}
"""Old name: new name, of keys at the top of a recipe. Version 0.1.0 called rollouts steps."""


def with_new_names(tree: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """Gives the keys of a recipe their new names, in place; yields each old name that was found, with the new one.

    A recipe that has both keeps both, so that the old one is refused as unknown.
    """
    for old, new in RENAMED.items():
        if old in tree and new not in tree:
            tree[new] = tree.pop(old)
            yield old, new


def hint(where: str, old: str, new: str, what: str = "key") -> None:
    """One line that a key has another name now; stderr."""
    print(f"{where}: the {what} {old!r} is called {new!r} since version 0.2, and will be unknown in the next one", file=sys.stderr)
