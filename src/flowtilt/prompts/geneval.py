"""Prompts in GenEval's form (arXiv 2310.11513): its templates over its classes, colours and relations, with metadata.

    tag             template                                prompts
    single_object   a photo of a dog                             80
    two_object      a photo of a dog and a cat                 6320
    counting        a photo of three dogs                       234
    colors          a photo of a red dog                        790
    position        a photo of a dog left of a cat            25280
    color_attr      a photo of a red dog and a blue cat      554580

As in the benchmark, persons have no colours, and two objects differ in class and colour. Plurals only ever
add "s", or "es" to an "s"; "skis" and "scissors" are not counted.
"""

import json
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from itertools import chain
from typing import Any

import torch

from flowtilt.errors import UserError
from flowtilt.prompts.geneval_objects import CLASSES, COLORS, RELATIONS, TAGS
from flowtilt.prompts.prompt import Prompt
from flowtilt.seeding import generator

NUMBERS = {2: "two", 3: "three", 4: "four"}
COUNTED = tuple(name for name in CLASSES if name not in ("skis", "scissors"))
COLORED = tuple(name for name in CLASSES if name != "person")
OPPOSITE = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}

Include = list[dict[str, Any]]


def generate(number: int, seed: int, exclude: Collection[str] = ()) -> list[Prompt]:
    """So many different prompts, drawn by a seed; the first n of more are the n that would be drawn alone.

    The six tags take turns, so they are equally frequent until one has no more prompts; the others then go
    on without it. Of 50,000, color_attr and position are about 43 % each.

    Args:
        exclude: captions, such as a test set's, that are left out together with those that say the same in
            the other order: "a cat and a dog" for "a dog and a cat", "right of" for "left of".

    Raises:
        UserError: there are not so many.
    """
    walks = [_walk(tag, seed, frozenset(exclude)) for tag in TAGS]
    found: list[Prompt] = []
    while walks and len(found) < number:
        row = [next(walk, None) for walk in walks]
        walks = [walk for walk, prompt in zip(walks, row, strict=True) if prompt]
        found += [prompt for prompt in row if prompt]
    if len(found) < number:
        raise UserError(f"prompts: GenEval's templates make {len(found)} prompts here, not {number}; ask for at most {len(found)}")
    return found[: max(number, 0)]


def to_lines(prompts: Sequence[Prompt]) -> str:
    """JSON lines as the benchmark writes them: tag, include, exclude where there is one, prompt."""
    records = ({"tag": prompt.tag, **prompt.metadata, "prompt": prompt.text} for prompt in prompts)
    return "".join(json.dumps(record) + "\n" for record in records)


def caption(include: Sequence[Mapping[str, Any]]) -> str:
    """The caption for a prompt's `include`."""
    phrases = [_phrase(entry) for entry in include]
    for entry, phrase in zip(include, phrases, strict=True):
        if "position" in entry:
            relation, target = entry["position"]
            return f"a photo of {phrase} {relation} {phrases[target]}"
    return "a photo of " + " and ".join(phrases)


def _phrase(entry: Mapping[str, Any]) -> str:
    name, count = entry["class"], entry["count"]
    if count > 1:
        return f"{NUMBERS[count]} {name}{'es' if name.endswith('s') else 's'}"
    words = f"{entry['color']} {name}" if "color" in entry else name
    return f"{'an' if words[0] in 'aeiou' else 'a'} {words}"


def _walk(tag: str, seed: int, exclude: frozenset[str]) -> Iterator[Prompt]:
    """All prompts of a tag in an order drawn by the seed."""
    size, member = SPACES[tag]
    order = torch.randperm(size, generator=generator(seed, "geneval prompts", TAGS.index(tag)))
    for index in chain.from_iterable(some.tolist() for some in order.split(1000)):  # few are asked for more often than all
        include = member(index)
        text = caption(include)
        if exclude and (text in exclude or caption(_turned(include)) in exclude):
            continue
        counts = [{"class": entry["class"], "count": entry["count"] + 1} for entry in include if entry["count"] > 1]
        yield Prompt(text, tag, {"include": include} | ({"exclude": counts} if counts else {}))


def _turned(include: Include) -> Include:
    """The same scene, its two objects named in the other order."""
    if len(include) < 2:
        return include
    first, second = include
    if "position" not in second:
        return [second, first]
    relation, _ = second["position"]
    return [{"class": second["class"], "count": 1}, {**first, "position": [OPPOSITE[relation], 0]}]


def _one(name: str, **more: Any) -> dict[str, Any]:
    return {"class": name, "count": 1, **more}


def _pair(index: int, number: int) -> tuple[int, int]:
    """Two different numbers below `number`; index 0 … number (number - 1) - 1."""
    first, second = divmod(index, number - 1)
    return first, second + (second >= first)


def _single_object(index: int) -> Include:
    return [_one(CLASSES[index])]


def _two_object(index: int) -> Include:
    return [_one(CLASSES[k]) for k in _pair(index, len(CLASSES))]


def _counting(index: int) -> Include:
    name, count = divmod(index, len(NUMBERS))
    return [{"class": COUNTED[name], "count": list(NUMBERS)[count]}]


def _colors(index: int) -> Include:
    name, color = divmod(index, len(COLORS))
    return [_one(COLORED[name], color=COLORS[color])]


def _position(index: int) -> Include:
    pair, relation = divmod(index, len(RELATIONS))
    first, second = _pair(pair, len(CLASSES))
    return [_one(CLASSES[second]), _one(CLASSES[first], position=[RELATIONS[relation], 0])]


def _color_attr(index: int) -> Include:
    names, colors = divmod(index, len(COLORS) * (len(COLORS) - 1))
    pairs = zip(_pair(names, len(COLORED)), _pair(colors, len(COLORS)), strict=True)
    return [_one(COLORED[name], color=COLORS[color]) for name, color in pairs]


SPACES: dict[str, tuple[int, Callable[[int], Include]]] = {
    "single_object": (len(CLASSES), _single_object),
    "two_object": (len(CLASSES) * (len(CLASSES) - 1), _two_object),
    "counting": (len(COUNTED) * len(NUMBERS), _counting),
    "colors": (len(COLORED) * len(COLORS), _colors),
    "position": (len(CLASSES) * (len(CLASSES) - 1) * len(RELATIONS), _position),
    "color_attr": (len(COLORED) * (len(COLORED) - 1) * len(COLORS) * (len(COLORS) - 1), _color_attr),
}
"""How many prompts a tag has, and the one of each index."""
