"""Damaged and odd recipes and overrides: whatever they hold, loading one is a recipe or one line."""

import tomllib
from pathlib import Path
from typing import Any

from hypothesis import strategies as st

from flowtilt.config import known_keys, load_recipe, recipe_names, to_toml
from flowtilt.errors import UserError

KEYS = (
    *dict.fromkeys(key.name for key in known_keys()),
    "rewards.x",
    "rewards.x.weight",
    "rewards.x.options.y",
    "model",
    "base",
    "tags.two",
    "objective.backprop.x",
    "nonsense",
    "",
    "a..b",
    ".".join("a" * 3000),
)
VALUES = (
    "1",
    "-1",
    "0",
    "1e300",
    "-1e300",
    "1e-300",
    "nan",
    "inf",
    "9" * 25,
    "9" * 5000,
    "0x" + "f" * 5000,
    "true",
    '""',
    '"auto"',
    '"a\\u0000b"',
    '"' + "n" * 300 + '"',
    '"' + "n/" * 3000 + '"',
    '"\\ud7ff\\u202e"',
    "[]",
    "[1, 2]",
    "[0.9, 0.99]",
    '["a"]',
    "{}",
    '{type = "grpo"}',
    '{source = "", weight = 1}',
    "[" * 3000 + "]" * 3000,
    "2026-01-31",
    "12:00",
    "bare",
    "",
    "'''",
    "1\nseed = 2",
)


def inputs() -> st.SearchStrategy[Any]:
    """A recipe's source, the bytes of a file or a name, and overrides."""
    line = st.builds("{} = {}".format, st.sampled_from(KEYS), st.sampled_from(VALUES))
    override = st.one_of(st.builds("{}={}".format, st.sampled_from(KEYS), st.sampled_from(VALUES)), st.text(max_size=20))
    lines = st.lists(st.one_of(line, st.sampled_from(["[rewards]", "[model]", "[a.b.c]", "[[tags]]"])), max_size=4)
    started = st.sampled_from(['base = "playground"', 'base = "sd35m"', 'base = "recipe"', ""])
    file = st.one_of(
        st.builds(lambda first, rest: "\n".join([first, *rest]).encode(errors="replace"), started, lines),
        st.binary(max_size=60),
        st.sampled_from(
            [
                b"x = " + b"[" * 3000,
                b"x = " + b"{a=" * 3000,
                b'base = "' + b"n" * 300 + b'"',
                b".".join([b"a"] * 3000) + b"=1",
                b'base = "a\\u0000b"',
            ]
        ),
    )
    name = st.one_of(st.sampled_from([*recipe_names(), "n" * 300, "a\0b", ".", "..", "/", ""]), st.text(max_size=20))
    return st.tuples(st.one_of(file, name), st.lists(override, max_size=3))


def read(payload: Any, folder: Path) -> None:
    """Raises nothing but UserError; what loads is written, and loads again."""
    source, overrides = payload
    place: Path | str = source
    if isinstance(source, bytes):
        place = folder / "recipe.toml"
        place.write_bytes(source)
    try:
        recipe = load_recipe(place, overrides)
    except UserError as error:
        assert len(str(error)) < 20_000, "an error of many pages"
        return
    text = to_toml(recipe)
    tomllib.loads(text)
    again = folder / "again.toml"
    again.write_text(text, encoding="utf-8")
    assert load_recipe(again) == recipe
