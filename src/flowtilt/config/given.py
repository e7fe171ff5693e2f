"""A recipe as Python gives it: a name, a path or a dict, keys as keywords, rewards and methods as objects."""

import json
import sys
from collections.abc import Callable, Mapping
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from flowtilt.config.files import merge, read, validate, write_out
from flowtilt.config.naming import reward_name
from flowtilt.config.renamed import hint, with_new_names
from flowtilt.config.settings import Recipe
from flowtilt.errors import UserError
from flowtilt.methods.base import Method

OBJECT = "python://"
"""How the source of a reward begins that is a Python object. No file holds it, so only Python can resume the run."""
WHERE = "Python"
Objects = dict[str, Callable[..., Any]]
"""Rewards that are Python objects, by name."""


def given_recipe(
    source: Recipe | str | Path | Mapping[str, Any], rewards: Any = None, keys: Mapping[str, Any] | None = None
) -> tuple[Recipe, Objects]:
    """The recipe that a user means, and those of its rewards that are Python objects.

    Args:
        source: a recipe, its name, a .toml file, or its keys as a dict, which may have `base`.
        rewards: the rewards by name, in place of the recipe's, or one: a callable or its source. The evaluation reports them, too,
            unless `keys` say what it reports.
        keys: further keys, on top of the recipe: {"rollouts": 20, "rollout": {"prompts": 6}}.

    Raises:
        UserError: unknown keys, values that don't fit, or a reward that is none.
    """
    objects: Objects = {}
    if isinstance(source, Recipe) and rewards is None and not keys:
        return source, objects
    above = plain(keys or {}, objects)
    if rewards is not None:
        above["rewards"] = _rewards(rewards, objects)
    if isinstance(source, Recipe):
        tree, origins, where = source.model_dump(mode="json", exclude_none=True), {}, source.name
    elif isinstance(source, Mapping):
        own = plain(source, objects)
        base = own.pop("base", None)
        tree, origins = read(str(base)) if base else ({}, {})
        merge(tree, own)
        where = WHERE
    elif isinstance(source, str | Path):
        (tree, origins), where = read(str(source)), str(source)
    else:
        raise UserError(f"recipe: want a name, a .toml file, a dict or a Recipe, not {type(source).__name__}")
    merge(tree, above)
    origins = {key: at for key, at in origins.items() if key.partition(".")[0] not in above}
    return validate(tree, origins | dict.fromkeys(above, WHERE), where), objects


def overrides(keys: Mapping[str, Any]) -> list[str]:
    """The same keys as `key=value`, as `load_recipe` takes them."""
    found: list[str] = []

    def note(prefix: str, tree: Mapping[str, Any]) -> None:
        for key, value in tree.items():
            if isinstance(value, dict):
                note(f"{prefix}{key}.", value)
            else:
                found.append(f"{prefix}{key}={json.dumps(value)}")

    note("", plain(keys, {}))
    return found


def for_run(recipe: Recipe, rewards: Any) -> Objects:
    """The Python objects of a run that is resumed, by name.

    Raises:
        UserError: the run has no reward of that name, or one of its objects is missing.
    """
    objects: Objects = {}
    _rewards({} if rewards is None else rewards, objects)
    for name in objects:
        if name not in recipe.rewards:
            near = get_close_matches(name, recipe.rewards, 1)
            raise UserError(f"rewards.{name}: the run has no such reward; " + (f"did you mean {near[0]!r}?" if near else _has(recipe)))
    return objects


def held_by_python(recipe: Recipe) -> list[str]:
    """Names of the rewards that only Python can give a run."""
    return [name for name, reward in recipe.reward_table().items() if str(reward.source).startswith(OBJECT)]


def plain(tree: Mapping[str, Any], objects: Objects) -> dict[str, Any]:
    """Keys as TOML could have them; callables among the rewards go to `objects`."""
    found = {str(key): _value(value) for key, value in tree.items() if key != "rewards"}
    for old, new in with_new_names(found):
        hint(WHERE, old, new)
    if "rewards" in tree:
        found["rewards"] = _rewards(tree["rewards"], objects)
    write_out(found)
    return found


def _value(value: Any) -> Any:
    if isinstance(value, Method):
        return {**value.model_dump(mode="json", exclude_unset=True), "type": value.type or _own_type(value)}
    if isinstance(value, BaseModel):
        return value.model_dump(mode="json", exclude_unset=True)
    if isinstance(value, Mapping):
        return {str(key): _value(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_value(inner) for inner in value]
    return value.item() if callable(getattr(value, "item", None)) else str(value) if isinstance(value, Path) else value


def _own_type(method: Method) -> str:
    place = _place(type(method))
    if place is None:
        name = type(method).__name__
        raise UserError(
            f"objective: {name} was defined in Python, not in a file, and a run could not resume with it; "
            f'write it to a file and set objective={{"type": "mine.py:{name}"}}, or train with flowtilt.Learner'
        )
    return place


def _rewards(rewards: Any, objects: Objects) -> dict[str, Any]:
    if isinstance(rewards, str):
        rewards = {reward_name(rewards): rewards}
    if callable(rewards):
        rewards = {getattr(rewards, "__name__", type(rewards).__name__).strip("<>") or "reward": rewards}
    if not isinstance(rewards, Mapping):
        raise UserError(f'rewards: want a dict of rewards by name, such as {{"mine": reward}}, not {type(rewards).__name__}')
    return {str(name): _reward(str(name), value, objects) for name, value in rewards.items()}


def _reward(name: str, value: Any, objects: Objects) -> Any:
    if isinstance(value, BaseModel):
        return value.model_dump(mode="json", exclude_none=True)
    if isinstance(value, Mapping):
        return {str(key): _reward(name, inner, objects) if key == "source" else _value(inner) for key, inner in value.items()}
    if callable(value):
        objects[name] = value
        return _place(value) or f"{OBJECT}{name}"
    value = _value(value)
    if value is None or not isinstance(value, str | int | float):
        raise UserError(f'rewards.{name}: want a callable, a weight, a built-in name, "file.py:function" or an address, not {value!r:.80}')
    return value


def _place(thing: Any) -> str | None:
    """ "file.py:name" of a function or class that a module's file has at its top level; none of any other object."""
    name, module = getattr(thing, "__qualname__", ""), sys.modules.get(str(getattr(thing, "__module__", "")))
    file = getattr(module, "__file__", None)
    if not (module and file and str(file).endswith(".py")) or module.__name__ == "__main__" or "." in module.__name__:
        return None
    return f"{file}:{name}" if getattr(module, name, None) is thing else None


def _has(recipe: Recipe) -> str:
    return f"it has {', '.join(recipe.rewards)}"
