"""The version of a recipe, which counts the changes that an earlier flowtilt could not read.

A run's recipe says it; in one that is written by hand it may be left out. Keys of other names: `config.renamed`.
"""

from typing import Any

from flowtilt.errors import UserError

VERSION = 2
"""1 is that of 0.1.0, whose recipes do not say it; 2 calls rollouts so."""


def check_version(tree: dict[str, Any], where: str) -> None:
    """Removes `version` from a recipe's tree.

    Raises:
        UserError: a later flowtilt has written it.
    """
    version = tree.pop("version", VERSION)
    if not isinstance(version, int) or isinstance(version, bool) or version < 1:
        raise UserError(f"recipe {where}: version = {version!r:.40} must be a whole number from 1")
    if version > VERSION:
        raise UserError(
            f"recipe {where}: is of version {version}, this flowtilt reads up to {VERSION}; upgrade it: pip install -U flowtilt"
        )
