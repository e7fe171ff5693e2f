"""Turns pydantic's errors into lines that say what was wrong, where it was set, and what was meant."""

from difflib import get_close_matches
from typing import Any

from pydantic import BaseModel, ValidationError

from flowtilt.config.keys import chosen, names, variants


def explain(error: ValidationError, model: type[BaseModel], tree: dict[str, Any], origins: dict[str, str], where: str) -> str:
    """All problems of a recipe in one line, separated by "; ".

    Args:
        tree: what was validated.
        origins: key -> where it was set.
        where: the recipe, for keys that were not set.
    """
    keys = names(model, tree)
    found: dict[str, list[str]] = {}
    for problem in error.errors():
        key = _typed(problem["loc"], tree, problem["type"])
        if problem["type"] == "value_error":  # our own checks name their key
            key, _, text = problem["msg"].removeprefix("Value error, ").partition(": ")
        elif problem["type"] == "unknown_method":
            key, text = f"{key}.type", problem["msg"]
        elif problem["type"] == "own_method":
            key, _, text = problem["msg"].partition(": ")
        elif problem["type"] == "extra_forbidden":
            text = _owner(key, model, tree) or _unknown(key, keys)
        else:
            text = _complaint(problem)
        found.setdefault(key, []).append(text)
    # a value that may be of several types failed as each: where it is a table, only what is wrong inside counts
    outer = [key for key in found if any(other.startswith(key + ".") for other in found)]
    return f"recipe {where}: " + "; ".join(
        f"{key}: {_either(texts)} [{_origin(key, origins, where)}]" for key, texts in found.items() if key not in outer
    )


def _typed(loc: tuple[int | str, ...], tree: Any, kind: str) -> str:
    """The key as the user typed it: pydantic adds the branch of a union and the place in a list."""
    parts = []
    for k, part in enumerate(loc):
        if isinstance(tree, dict) and (part in tree or (kind == "missing" and k == len(loc) - 1)):
            parts.append(str(part))
            tree = tree.get(part)
        elif isinstance(tree, list) and isinstance(part, int) and part < len(tree):
            tree = tree[part]
    return ".".join(parts)


def _owner(key: str, model: type[BaseModel], tree: dict[str, Any]) -> str:
    """Whose a key is, where its table has a `type` and another one has that key, or one much like it."""
    name, _, inner = key.partition(".")
    field = model.model_fields.get(name)
    if field is None:
        return ""
    kind = chosen(tree.get(name), field)
    kinds = variants(field.annotation, kind)
    if kind not in kinds:
        return ""
    meant = [inner] if any(inner in table.model_fields for table in kinds.values()) else []
    # another method's key is spelt right, so only what is nearly the same can have been meant
    here = get_close_matches(inner, kinds[kind].model_fields, 1, cutoff=0.8 if meant else 0.6)
    if not meant and not here:
        meant = get_close_matches(inner, {known for table in kinds.values() for known in table.model_fields}, 1)
    if not meant:
        return ""
    owners = _or([repr(other) for other, table in kinds.items() if meant[0] in table.model_fields])
    near = f"; did you mean {f'{name}.{here[0]}'!r}?" if here else ""
    said = "" if meant[0] == inner else f"unknown key; {f'{name}.{meant[0]}'!r} "
    return f"{said}belongs to {name}.type = {owners}, not {kind!r}{near}"


def _or(words: list[str]) -> str:
    *others, last = words
    return f"{', '.join(others)} or {last}" if others else last


def _unknown(key: str, keys: list[str]) -> str:
    parts = key.split(".")
    known = [k.replace("*", ".".join(parts[1:2])) for k in keys if "*" not in k or len(parts) > 2]
    same = [k for k in known if k.rpartition(".")[2] == parts[-1]]
    close = get_close_matches(key, [k for k in known if not key.startswith(k + ".")], 1, 0.6)
    near = same if len(same) == 1 else close or same
    return f"unknown key; did you mean {near[0]!r}?" if near else "unknown key; `flowtilt keys` lists all"


def _complaint(problem: Any) -> str:
    if problem["type"] == "missing":
        return "has too few values" if isinstance(problem["loc"][-1], int) else "is missing"
    if problem["input"] == "" and problem["type"] != "literal_error":  # which lists what there is
        return "is empty, give it a value"
    return problem["msg"].removeprefix("Input ").replace("should be", "must be") + f", not {problem['input']!r:.200}"


def _either(texts: list[str]) -> str:
    """One complaint of several about one value."""
    texts = list(dict.fromkeys(texts))
    value = texts[-1].rpartition(", not ")[2]
    return " or ".join([text.removesuffix(f", not {value}") for text in texts[:-1]] + texts[-1:])


def _origin(key: str, origins: dict[str, str], where: str) -> str:
    """Where the key was set, or else a table that holds it, or else something in it."""
    parent = key
    while parent:
        if parent in origins:
            return origins[parent]
        parent = parent.rpartition(".")[0]
    return next((at for other, at in origins.items() if other.startswith(key + ".")), where)
