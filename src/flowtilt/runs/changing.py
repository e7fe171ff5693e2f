"""What a resumed run may set anew: keys that do not touch what was computed before."""

from collections.abc import Mapping
from typing import Any

from flowtilt.config import Recipe
from flowtilt.config.renamed import RENAMED
from flowtilt.rewards.about import built_in

MAY_CHANGE = ("rollouts", "run", "checkpoint", "evaluate", "guards", "track", "micro_batch", "shard", "log")
"""Keys at the top of a recipe."""
_SERVED = ("timeout", "patience", "images_per_request", "workers")
"""Options of a reward on a `flowtilt serve-rewards`, whose source is its address."""


def may_change(override: str, recipe: Recipe) -> bool:
    """Whether a resumed run of this recipe may have this "key=value"."""
    key, _, value = override.partition("=")
    first, *rest = key.strip().split(".")
    if RENAMED.get(first, first) in MAY_CHANGE:
        return True
    if first != "rewards" or len(rest) < 2 or rest[0] not in recipe.rewards:
        return False
    source = recipe.reward_table()[rest[0]].source or rest[0]
    if rest[1:] == ["source"]:
        return "://" in source and "://" in value
    return rest[-1] in _of_service(source) and rest[1:-1] in ([], ["options"])


def told() -> str:
    """What may change, for an error."""
    return f"{', '.join(MAY_CHANGE)}, and of a reward on a server its address, patience and budget"


def fixed(recipe: Recipe) -> dict[str, Any]:
    """The recipe without what may change."""
    found = recipe.model_dump(exclude=set(MAY_CHANGE))
    found["rewards"] = {name: _fixed(one.source or name, one.model_dump()) for name, one in recipe.reward_table().items()}
    return found


def _fixed(source: str, reward: Mapping[str, Any]) -> dict[str, Any]:
    options = {key: value for key, value in reward["options"].items() if key not in _of_service(source)}
    return {**reward, "source": "a server" if "://" in source else source, "options": options}


def _of_service(source: str) -> tuple[str, ...]:
    if "://" in source:
        return _SERVED
    return built_in()[source].service_options if source in built_in() else ()
