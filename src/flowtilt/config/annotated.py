"""A recipe as a file to edit: every key with its meaning; what equals its default is commented out."""

import textwrap
from collections.abc import Iterator
from typing import Any

from pydantic import BaseModel

from flowtilt.config.files import toml_key, toml_value
from flowtilt.config.settings import Recipe

WIDTH = 110
HEAD = """# {about}
# A key that is commented out has the default that is shown. `flowtilt keys PATTERN` searches all keys.
# `base = "NAME"` at the top starts from another recipe instead: a file then needs only the keys that differ from it.
"""


def annotated(recipe: Recipe, about: str) -> str:
    """TOML that `load_recipe` reads back equal.

    Args:
        about: one line for the top of the file.
    """
    plain, tables = [], []
    for name, value in recipe:
        if name == "rewards" or isinstance(value, BaseModel):
            tables.append(_table(name, value, Recipe.model_fields[name].description or ""))
        else:
            plain.append(_key(Recipe, name, value))
    return "\n".join([HEAD.format(about=about), *plain, *tables])


def _table(name: str, value: Any, description: str) -> str:
    head = f"{_comment(description)}[{name}]\n"
    if isinstance(value, BaseModel):
        return head + "\n".join(_key(type(value), key, inner) for key, inner in value)
    return head + "".join(f"{toml_key(key)} = {toml_value(_data(inner))}\n" for key, inner in value.items())


def _key(model: type[BaseModel], name: str, value: Any) -> str:
    """One key with its meaning before it."""
    field = model.model_fields.get(name)
    meaning = _comment(field.description or "") if field else ""
    default = ... if field is None or field.is_required() or name == "type" else field.get_default(call_default_factory=True)
    if value is None:
        return f"{meaning}# {name} =\n"
    return f"{meaning}{'# ' if value == default else ''}{toml_key(name)} = {toml_value(_data(value))}\n"


def _data(value: Any) -> Any:
    if isinstance(value, BaseModel):
        return {key: _data(inner) for key, inner in value if inner is not None and inner != type(value).model_fields[key].default}
    return list(value) if isinstance(value, tuple) else value


def _comment(text: str) -> str:
    return "".join(f"# {line}\n" for line in _wrapped(text))


def _wrapped(text: str) -> Iterator[str]:
    yield from textwrap.wrap(text, WIDTH, break_long_words=False, break_on_hyphens=False)
