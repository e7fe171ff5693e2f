"""GenEval's metadata, checked: what a prompt asks for."""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from numbers import Real
from typing import Any

from flowtilt.errors import UserError
from flowtilt.prompts.geneval_objects import CLASSES, COLORS, RELATIONS, TAGS

MOST_OBJECTS = 1000
"""Objects of a class that a prompt may ask for; no detector finds as many."""


@dataclass(frozen=True)
class Entry:
    """So many objects of a class, perhaps of a colour, perhaps in a relation to those of another entry.

    Args:
        position: the relation and the index of the other entry.
    """

    name: str
    count: int
    color: str | None = None
    position: tuple[str, int] | None = None


@dataclass(frozen=True)
class Request:
    """What a prompt asks for.

    Args:
        order: indices of `include` in which every entry comes after the one that it stands in relation to.
    """

    tag: str
    include: tuple[Entry, ...]
    exclude: tuple[Entry, ...]
    order: tuple[int, ...]


def parse(metadata: Mapping[str, Any]) -> Request:
    """Reads "tag", "include" and "exclude" of a line of metadata; other keys are left alone.

    GenEval's own entries point at earlier ones; later ones are allowed too.

    Raises:
        UserError: names the key and what should stand there.
    """
    if not isinstance(metadata, Mapping):
        raise wrong("metadata", metadata, 'an object with "tag" and "include"')
    tag = name_among(TAGS, metadata.get("tag"), "tag")
    include, exclude = _entries(metadata, "include"), _entries(metadata, "exclude")
    return Request(tag, include, exclude, _order(include))


def _entries(metadata: Mapping[str, Any], key: str) -> tuple[Entry, ...]:
    entries = metadata.get(key)
    if entries is None:
        return ()
    if not isinstance(entries, Sequence) or isinstance(entries, str):
        raise wrong(key, entries, 'a list of {"class": …, "count": …}')
    return tuple(_entry(entry, f"{key}[{i}]", len(entries)) for i, entry in enumerate(entries))


def _entry(entry: Any, place: str, entries: int) -> Entry:
    if not isinstance(entry, Mapping):
        raise wrong(place, entry, '{"class": …, "count": …}')
    name = name_among(CLASSES, entry.get("class"), f"{place}.class")
    count: Any = entry.get("count")
    if not _whole(count) or not 1 <= count <= MOST_OBJECTS:
        raise wrong(f"{place}.count", count, f"a whole number from 1 to {MOST_OBJECTS}")
    color = entry.get("color")
    if color is not None:
        color = name_among(COLORS, color, f"{place}.color")
    position = entry.get("position")
    if position is not None:
        if not isinstance(position, Sequence) or isinstance(position, str) or len(position) != 2:
            raise wrong(f"{place}.position", position, "a relation and an entry's index")
        relation, target = position
        name_among(RELATIONS, relation, f"{place}.position")
        if not _whole(target) or not 0 <= target < entries:
            raise wrong(f"{place}.position", target, f"the index of another entry, 0 to {entries - 1}")
        position = (relation, int(target))
    return Entry(name, int(count), color, position)


def _order(include: Sequence[Entry]) -> tuple[int, ...]:
    order: dict[int, None] = {}
    while len(order) < len(include):
        ready = [i for i, entry in enumerate(include) if i not in order and (entry.position is None or entry.position[1] in order)]
        if not ready:
            raise UserError("include: positions point in a circle; each must lead to an entry without one")
        order |= dict.fromkeys(ready)
    return tuple(order)


def name_among(known: Sequence[str], value: Any, place: str) -> str:
    """The value, which must be one of the known names.

    Raises:
        UserError: names the nearest, or all where they are few.
    """
    if isinstance(value, str) and value in known:
        return value
    names = ", ".join(known) if len(known) <= 10 else "one of COCO's 80 classes, as GenEval names them"
    if not isinstance(value, str):
        raise wrong(place, value, names)
    near = [name for name in known if value in name.split()] or get_close_matches(value, known, 1)  # COCO's "mouse"
    raise UserError(f"{place}: {_shown(value)} is unknown; " + (f'did you mean "{near[0]}"?' if near else f"it is {names}"))


def wrong(place: str, value: Any, wanted: str) -> UserError:
    """The error of a value of the wrong type or range."""
    return UserError(f"{place}: {'missing' if value is None else f'{_shown(value)} will not do'}; it is {wanted}")


def real(value: Any) -> bool:
    """Whether a value is a finite number."""
    try:
        return isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(value)
    except OverflowError:  # an integer beyond every float
        return False


def _whole(value: Any) -> bool:
    return real(value) and int(value) == value


def _shown(value: Any) -> str:
    try:
        text = json.dumps(value, ensure_ascii=False, default=repr, skipkeys=True)
    except (ValueError, RecursionError):  # thousands of digits or of levels
        return f"this {type(value).__name__}"
    return text if len(text) <= 60 else text[:57] + "…"
