"""Recipes as TOML: found by name or path, put on top of each other, overridden, checked, written.

`key=value` on the command line overrides one key, the value parsed as TOML, a bare word being a string. `base = "name"`
starts from another recipe.
"""

import json
import os
import tomllib
from collections.abc import Iterator, Sequence
from difflib import get_close_matches
from importlib import resources
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from flowtilt.config.errors import explain
from flowtilt.config.naming import reward_name
from flowtilt.config.renamed import RENAMED, hint, with_new_names
from flowtilt.config.settings import Recipe
from flowtilt.config.version import VERSION, check_version
from flowtilt.errors import UserError
from flowtilt.io.user_code import is_missing_file

LONGEST_NUMBER = 300
"""Digits of a whole number in a recipe; every key's own bound is far below."""


def recipe_names() -> list[str]:
    """Names of the recipes inside the package."""
    return sorted(file.name.removesuffix(".toml") for file in resources.files("flowtilt.recipes").iterdir() if file.name.endswith(".toml"))


def load_recipe(source: str | Path, overrides: Sequence[str] = (), stored: bool = False) -> Recipe:
    """The recipe of a name or file, with `key=value` overrides.

    Args:
        stored: only read, as of a finished run: a user's own method stays plain values, and its file is not run.

    Raises:
        UserError: no such recipe, a file that is not TOML, or keys and values that do not fit: all of
            them, each with its origin, and the nearest key.
    """
    try:
        return _load(source, overrides, stored)
    except RecursionError:
        raise UserError(f"recipe {source!s:.200}: tables or lists are nested too deeply") from None


def _load(source: str | Path, overrides: Sequence[str], stored: bool) -> Recipe:
    tree, origins = read(str(source), stored=stored)
    if "rewards" in [item.partition("=")[0].strip() for item in overrides]:
        _forget_score(tree)
    for item in _type_first(overrides):
        key, sign, text = item.partition("=")
        if not sign or not key.strip():
            raise UserError(f"override {item!r:.200} is not key=value")
        key = _set(tree, key.strip().split("."), _value(text), item)
        table = key.removesuffix(".solver")
        if key in ("rollout.solver", "evaluate.solver") and not origins.get(f"{table}.eta", "").startswith("command line"):
            _leave_cps(tree[table], tree[table])
        origins = _newer(origins, {key: f"command line: {item:.300}"})
    _drop_examples(tree, origins)
    return validate(tree, origins, str(source), stored)


def _type_first(overrides: Sequence[str]) -> list[str]:
    """Overrides with `objective.type`, which empties the table where it names another method, before the keys of that table."""
    keys = [item.partition("=")[0].strip() for item in overrides]
    first = next((k for k, key in enumerate(keys) if key.startswith("objective.")), len(keys))
    later = sorted(range(first, len(keys)), key=lambda k: keys[k] != "objective.type")
    return [*overrides[:first], *(overrides[k] for k in later)]


def _drop_examples(tree: dict[str, Any], origins: dict[str, str]) -> None:
    """Leaves out a reward file that a recipe inside the package names as an example, where it is not there and the user sets others."""
    rewards = tree.get("rewards")
    if not isinstance(rewards, dict) or not any(at.startswith("command line") for key, at in origins.items() if key.startswith("rewards.")):
        return
    packaged = {f"{name}.toml" for name in recipe_names()}
    for name, source in list(rewards.items()):
        if isinstance(source, str) and origins.get(f"rewards.{name}") in packaged and is_missing_file(source):
            del rewards[name], origins[f"rewards.{name}"]


def validate(tree: dict[str, Any], origins: dict[str, str], where: str, stored: bool = False) -> Recipe:
    """Checks a tree of values; `origins` says where a key was set, `stored` is as for `load_recipe`."""
    check_version(tree, where)
    for key, value in _values(tree):
        if isinstance(value, int) and abs(value) > 10**LONGEST_NUMBER:  # which JSON would not write
            raise UserError(f"recipe {where}: {key:.80}: a number of more than {LONGEST_NUMBER} digits [{origins.get(key, where):.200}]")
    try:
        return Recipe.model_validate_json(
            json.dumps(tree, default=str), strict=True, context={"stored": stored}
        )  # str: of a date, so that run=2026-01-31 is a name
    except ValidationError as error:
        raise UserError(explain(error, Recipe, tree, origins, where)) from None


def to_toml(recipe: Recipe) -> str:
    """The recipe as TOML that `load_recipe` reads back equal; what is none is left out."""
    tree = {"version": VERSION, **recipe.model_dump(mode="json", exclude_none=True)}
    plain = [f"{key} = {toml_value(value)}" for key, value in tree.items() if not isinstance(value, dict)]
    tables = [
        f"\n[{key}]\n" + "\n".join(f"{toml_key(k)} = {toml_value(v)}" for k, v in value.items())
        for key, value in tree.items()
        if isinstance(value, dict) and value
    ]
    return "\n".join(plain) + "\n" + "\n".join(tables) + "\n"


def toml_value(value: Any) -> str:
    """A value in one line; tomli_w has neither inline tables nor comments, which a recipe has both of."""
    if isinstance(value, dict):
        return "{ " + ", ".join(f"{toml_key(k)} = {toml_value(v)}" for k, v in value.items()) + " }"
    if isinstance(value, list):
        return "[" + ", ".join(map(toml_value, value)) + "]"
    # JSON's numbers, booleans and strings are TOML's, once DEL is escaped
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")


def toml_key(key: str) -> str:
    """A key, quoted where it has to be."""
    return key if key.isascii() and key.replace("_", "a").replace("-", "a").isalnum() else toml_value(key)


def read(source: str, seen: tuple[str, ...] = (), stored: bool = False) -> tuple[dict[str, Any], dict[str, str]]:
    """The tree of a name or file on top of its bases, not yet checked, and where each key was set; `stored` is as for `load_recipe`."""
    text, where = _find(source)
    try:
        tree = tomllib.loads(text)
    except ValueError as error:  # tomllib's own, or Python's of a number of thousands of digits
        raise UserError(f"recipe {where}: not TOML: {error}") from None
    check_version(tree, where)
    for old, new in with_new_names(tree):
        if not stored:
            hint(f"recipe {where}", old, new)
    base = tree.pop("base", None)
    write_out(tree)
    origins = {key: where for key in _leaves(tree)}
    if base is None:
        return tree, origins
    if not isinstance(base, str):
        raise UserError(f"recipe {where}: base = {base!r:.80} must name another recipe")
    base_source = _base_of(base, where)
    seen = (*seen, _identity(source))
    if _identity(base_source) in seen:
        raise UserError(f"recipe {where}: base = {base!r} must name another recipe, but comes back to itself")
    base, base_origins = read(base_source, seen, stored)
    merge(base, tree)
    return base, _newer(base_origins, origins)


def chain(source: str) -> list[tuple[str, str]]:
    """Where a recipe and each of its bases is, with its text; the recipe itself first."""
    text, where = _find(source)
    base = tomllib.loads(text).get("base")
    return [(where, text), *(chain(_base_of(base, where)) if base else [])]


def _base_of(base: str, where: str) -> str:
    return base if base in recipe_names() else str(Path(where).parent / base)


def _identity(source: str) -> str:
    # realpath, unlike isfile, raises for a zero byte
    return source if source in recipe_names() or "\0" in source else os.path.realpath(source)


def _find(source: str) -> tuple[str, str]:
    names = recipe_names()
    if source in names:
        return resources.files("flowtilt.recipes").joinpath(f"{source}.toml").read_text(encoding="utf-8"), f"{source}.toml"
    path = Path(source)
    if os.path.isfile(source):  # unlike pathlib's, false also for a name that is too long or has a zero byte in it
        try:
            return path.read_text(encoding="utf-8-sig"), str(path)
        except UnicodeDecodeError:
            raise UserError(f"recipe {path}: not UTF-8 text") from None
        except OSError as error:
            raise UserError(f"recipe {path}: {error.strerror}") from None
    near = get_close_matches(source[:100], names, 1)
    hint = f"did you mean {near[0]!r}?" if near else f"give a .toml file or one of: {', '.join(names)}"
    raise UserError(f"recipe {source!r:.200}: no such recipe or file; {hint}")


def _leaves(tree: dict[str, Any], prefix: str = "") -> list[str]:
    found = []
    for key, value in tree.items():
        found += _leaves(value, f"{prefix}{key}.") if isinstance(value, dict) else [prefix + key]
    return found


def _values(tree: Any, key: str = "") -> Iterator[tuple[str, Any]]:
    """Every value that is no table or list, with its table's key."""
    if isinstance(tree, dict):
        for name, value in tree.items():
            yield from _values(value, f"{key}.{name}" if key else name)
    elif isinstance(tree, list):
        for value in tree:
            yield from _values(value, key)
    else:
        yield key, tree


def _newer(base: dict[str, str], above: dict[str, str]) -> dict[str, str]:
    """Origins once the keys of `above` were set: what stood at or under one of them is gone."""
    return {old: at for old, at in base.items() if not any(old.startswith(key + ".") for key in above)} | above


def write_out(tree: dict[str, Any]) -> None:
    """Puts the table in the place of a model or reward that is given as a string alone."""
    if isinstance(model := tree.get("model"), str):
        tree["model"] = {"path": model}
    if isinstance(reward := tree.get("rewards"), str) and reward:
        tree["rewards"] = {reward_name(reward): reward}


def merge(base: dict[str, Any], above: dict[str, Any]) -> None:
    """Puts a tree on top of another, in place."""
    if "rewards" in above:
        _forget_score(base)
    for key, value in above.items():
        if key == "rewards":  # what a run is for: a recipe that names its own means those alone
            base[key] = value
        elif isinstance(value, dict) and isinstance(base.get(key), dict):
            # another variant starts from its own defaults, not from the old one's values
            if key == "objective" and value.get("type", base[key].get("type", "nft")) != base[key].get("type", "nft"):
                base[key] = {}
            if key in ("rollout", "evaluate"):
                _leave_cps(base[key], value)
            merge(base[key], value)
        else:
            base[key] = value


def _forget_score(tree: dict[str, Any]) -> None:
    """Other rewards are reported, too, until what is on top says otherwise."""
    if isinstance(tree.get("evaluate"), dict):
        tree["evaluate"].pop("rewards", None)


def _leave_cps(base: dict[str, Any], above: dict[str, Any]) -> None:
    """Another solver that is set above cps has no use for its eta."""
    if above.get("solver", "cps") != "cps":
        base.pop("eta", None)


def _set(tree: dict[str, Any], parts: list[str], value: Any, item: str) -> str:
    """Sets one key in place; returns the key, spelt out."""
    if parts == ["model"] and isinstance(value, str):
        parts = ["model", "path"]
    if parts == ["rewards"] and isinstance(value, str) and value:
        value = {reward_name(value): value}
    if len(parts) == 1 and parts[0] in RENAMED:
        hint(f"override {item!r:.200}", parts[0], RENAMED[parts[0]])
        parts = [RENAMED[parts[0]]]
    node = tree
    rewards = tree.get("rewards")
    given = rewards.get(parts[1]) if isinstance(rewards, dict) and len(parts) > 2 and parts[0] == "rewards" else None
    if isinstance(given, str | int | float) and not isinstance(given, bool):  # a reward in its short form
        tree["rewards"][parts[1]] = {"source" if isinstance(given, str) else "weight": given}
    for part in parts[:-1]:
        node = node.setdefault(part, {})
        if not isinstance(node, dict):
            raise UserError(f"override {item!r:.200}: {part!r} is a value, not a table")
    if parts == ["objective", "type"] and node.get("type", "nft") != value:
        node.clear()
    node[parts[-1]] = value
    return ".".join(parts)


def _value(text: str) -> Any:
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except ValueError:
        return text
