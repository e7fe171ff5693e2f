"""The keys that a recipe may have, read off its models."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from flowtilt import methods
from flowtilt.methods.base import Method


@dataclass(frozen=True)
class Key:
    """One key, dotted, with its pydantic field; a key of a table that has a `type` may mean something else for another one.

    Args:
        types: those for which it is this; none where it is the same for all, or there are no types.
    """

    name: str
    field: FieldInfo
    types: tuple[str, ...] = ()


def keys_of(model: type[BaseModel], prefix: str = "") -> Iterator[Key]:
    """Every key in order, those of all types among them."""
    for name, field in model.model_fields.items():
        if kinds := variants(field.annotation):
            yield from _keys_of_variants(kinds, f"{prefix}{name}.")
        elif isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            yield from keys_of(field.annotation, f"{prefix}{name}.")
        else:
            yield Key(prefix + name, field)


def _keys_of_variants(tables: dict[str, type[BaseModel]], prefix: str) -> Iterator[Key]:
    for name in dict.fromkeys(name for table in tables.values() for name in table.model_fields):
        found: dict[tuple[str, str | None], list[str]] = {}
        for kind, table in tables.items():
            if field := table.model_fields.get(name):
                found.setdefault((repr(field.default), field.description), []).append(kind)
        for kinds in found.values():
            field = tables[kinds[0]].model_fields[name]
            yield Key(prefix + name, field, () if len(kinds) == len(tables) else tuple(kinds))


def variants(annotation: Any, kind: Any = None) -> dict[str, type[BaseModel]]:
    """The tables that `type` chooses from, by its value, a user's own of type `kind` among them; nothing for another field."""
    return dict(methods.variants(kind)) if annotation is Method else {}


def names(model: type[BaseModel], tree: Any, prefix: str = "") -> list[str]:
    """Every key that a table or a value may have where `tree` chose the types; a name of the user's own is "*"."""
    found = []
    for name, field in model.model_fields.items():
        found.append(prefix + name)
        own = "*." if get_origin(field.annotation) is dict else ""
        inner = tree.get(name) if isinstance(tree, dict) else None
        kind = chosen(inner, field)
        kinds = variants(field.annotation, kind)
        known = [kinds[kind]] if kind in kinds else tables(field.annotation)
        for table in known:
            found += names(table, inner, f"{prefix}{name}.{own}")
    return list(dict.fromkeys(found))


def chosen(table: Any, field: FieldInfo) -> str:
    """The type of a table as the user wrote it, which may be none that exists, or else the default's."""
    default = getattr(field.default, "type", "")
    return str(table.get("type", default)) if isinstance(table, dict) else default


def tables(annotation: Any) -> list[type[BaseModel]]:
    """The models inside a type."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [table for part in get_args(annotation) for table in tables(part)]
