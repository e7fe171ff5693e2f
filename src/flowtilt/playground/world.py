"""A drawn world of coloured shapes with GenEval's six tags, its captions and its train/test split.

An image is 32x32 RGB: a dark background and one to four objects, each inside its own 16x16 quadrant.
Captions come from a closed grammar of 22 words; metadata has GenEval's form (`include` with class,
count, color and position), so that what reads GenEval reads this.

A prompt's *combination* is the set of objects it names. Test combinations occur in no training prompt
of any tag, neither when the base was pretrained nor when it is reinforced: if "red circle with blue
square" is a test combination, no training caption mentions the two together, in whatever order or
relation.

Settings are not to be chosen by the test. For that `search_prompts` divides the training prompts once more, in the
same manner: a validation split, and what is left to train on meanwhile. Reinforcement on the one has not met the
other's combinations; pretraining has, as it has met all that is not the test's.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from itertools import combinations, permutations
from typing import Literal

import torch
from torch import Tensor

from flowtilt.errors import UserError
from flowtilt.prompts import Prompt
from flowtilt.seeding import generator

SIZE = 32
BACKGROUND = (0.16, 0.16, 0.16)
COLORS = {"red": (0.90, 0.18, 0.18), "green": (0.18, 0.78, 0.28), "blue": (0.24, 0.38, 0.95), "yellow": (0.95, 0.85, 0.20)}
SHAPES = ("circle", "square", "triangle", "cross")
TAGS = ("single_object", "two_object", "counting", "colors", "position", "color_attr")
COUNTS = {2: "two", 3: "three", 4: "four"}
RELATIONS = ("left of", "right of", "above", "below")
RADIUS = (4.7, 5.2)
JITTER = 1.8

Named = tuple[str | None, str]  # (color or None, shape)
Combination = frozenset[tuple[int, str | None, str]]  # (count, color or None, shape)


@dataclass(frozen=True)
class Object:
    """A drawn object: centre (x, y) and radius in pixels, x to the right, y down."""

    shape: str
    color: str
    x: float
    y: float
    radius: float


def signed_distance(shape: str, dx: Tensor, dy: Tensor, radius: Tensor) -> Tensor:
    """Distance in pixels to the outline, negative inside; a shape's bounding box is centred on (0, 0)."""
    if shape == "circle":
        return torch.hypot(dx, dy) - radius
    if shape == "square":
        return torch.maximum(dx.abs(), dy.abs()) - 0.88 * radius
    if shape == "triangle":
        apex = 1.12 * radius  # circumradius; the box is 1.5 of it high, so its middle is .25 above the centroid
        low = dy - 0.25 * apex
        return torch.maximum(low, 0.8660254 * dx.abs() - 0.5 * low) - 0.5 * apex
    if shape == "cross":
        long, wide = torch.maximum(dx.abs(), dy.abs()), torch.minimum(dx.abs(), dy.abs())
        return torch.maximum(long - radius, wide - 0.34 * radius)
    raise ValueError(f"shape {shape!r} is not one of {SHAPES}")


def coverage(shape: str, x: Tensor, y: Tensor, radius: Tensor) -> Tensor:
    """How much of each pixel an object covers, [N, 32, 32] in [0, 1], antialiased over one pixel; x, y, radius [N]."""
    grid = torch.arange(SIZE, dtype=torch.float32) + 0.5
    dx = grid[None, None, :] - x[:, None, None]
    dy = grid[None, :, None] - y[:, None, None]
    return (0.5 - signed_distance(shape, dx, dy, radius[:, None, None])).clamp(0, 1)


def render(scenes: Sequence[Sequence[Object]]) -> Tensor:
    """Draws scenes: [N, 3, 32, 32] in [0, 1]."""
    images = torch.tensor(BACKGROUND)[None, :, None, None].repeat(len(scenes), 1, SIZE, SIZE)
    for shape in SHAPES:
        found = [(i, o) for i, scene in enumerate(scenes) for o in scene if o.shape == shape]
        if not found:
            continue
        x, y, radius = torch.tensor([[o.x, o.y, o.radius] for _, o in found]).unbind(1)
        masks = coverage(shape, x, y, radius)
        for (i, o), mask in zip(found, masks, strict=True):
            images[i] += mask * (torch.tensor(COLORS[o.color])[:, None, None] - images[i])
    return images


def arrange(prompt: Prompt, rng: torch.Generator) -> list[Object]:
    """A random scene that shows the prompt; unnamed colours are drawn, and objects of "a … and a …" stand in reading order."""
    include = prompt.metadata["include"]
    named = [(entry.get("color"), entry["class"]) for entry in include for _ in range(entry["count"])]
    relation = next((entry["position"][0] for entry in include if "position" in entry), None)
    if relation:
        cells = _related_cells(relation, rng)
    else:
        cells = torch.randperm(4, generator=rng)[: len(named)].tolist()
        if len(include) == 2:  # the first mentioned is left, or on top in the same column
            cells.sort(key=lambda cell: (cell % 2, cell // 2))
    palette = list(COLORS)
    scene = []
    for cell, (color, shape) in zip(cells, named, strict=True):
        u = torch.rand(3, generator=rng).tolist()
        pick = int(torch.randint(len(palette), (), generator=rng))
        x, y = (8 + 16 * half + JITTER * (2 * v - 1) for half, v in zip((cell % 2, cell // 2), u[:2], strict=True))
        scene.append(Object(shape, color or palette[pick], x, y, RADIUS[0] + (RADIUS[1] - RADIUS[0]) * u[2]))
    return scene


def _related_cells(relation: str, rng: torch.Generator) -> list[int]:
    """Quadrants (0 1 / 2 3) of the first- and second-named object, the other axis free."""
    a, b = torch.randint(2, (2,), generator=rng).tolist()
    first, second = (0, 1) if relation in ("left of", "above") else (1, 0)
    if relation in ("left of", "right of"):
        return [first + 2 * a, second + 2 * b]
    return [a + 2 * first, b + 2 * second]


def combination(prompt: Prompt) -> Combination:
    """The set of (count, colour, shape) that a prompt names: what the split keeps apart."""
    return frozenset((entry["count"], entry.get("color"), entry["class"]) for entry in prompt.metadata["include"])


@cache
def _all_prompts() -> tuple[Prompt, ...]:
    plain: list[Named] = [(None, shape) for shape in SHAPES]
    coloured: list[Named] = [(color, shape) for color in COLORS for shape in SHAPES]
    pairs = list(permutations(plain, 2))
    coloured_pairs = [(a, b) for a, b in permutations(coloured, 2) if a[0] != b[0] and a[1] != b[1]]
    return (
        *(_prompt("single_object", [(1, a)]) for a in plain),
        *(_prompt("two_object", [(1, a), (1, b)]) for a, b in pairs),
        *(_prompt("counting", [(count, a)]) for count in COUNTS for a in (*plain, *coloured)),
        *(_prompt("colors", [(1, a)]) for a in coloured),
        *(_prompt("position", [(1, a), (1, b)], r) for a, b in (*pairs, *coloured_pairs) for r in RELATIONS),
        *(_prompt("color_attr", [(1, a), (1, b)]) for a, b in coloured_pairs),
    )


def _prompt(tag: str, named: list[tuple[int, Named]], relation: str | None = None) -> Prompt:
    def phrase(count: int, color: str | None, shape: str) -> str:
        noun = shape if count == 1 else shape + ("es" if shape == "cross" else "s")
        return " ".join(word for word in ("a" if count == 1 else COUNTS[count], color, noun) if word)

    text = f" {relation or 'and'} ".join(phrase(count, *what) for count, what in named)
    include = [{"class": shape, "count": count} | ({"color": color} if color else {}) for count, (color, shape) in named]
    if relation:
        # GenEval's form: the object that carries the key stands so with respect to object [1]
        include[0]["position"] = [relation, 1]
    return Prompt(text, tag, {"include": include})


@cache
def _held_out(fold: int) -> frozenset[Combination]:
    """Combinations of the test (fold 0) or the validation split (fold 1), which share none.

    One shape, two pairs of shapes that share none, every colour with one shape, a fifth of the counts, a sixth of the coloured pairs.
    """
    colors = [None, *COLORS]
    plain = ((("cross",), ("circle", "triangle"), ("square", "cross")), (("square",), ("circle", "square"), ("triangle", "cross")))[fold]
    held: set[Combination] = {frozenset((1, None, shape) for shape in shapes) for shapes in plain}
    turned = SHAPES[fold:] + SHAPES[:fold]
    held |= {frozenset({(1, color, shape)}) for color, shape in zip(COLORS, turned, strict=True)}
    held |= {
        frozenset({(count, color, shape)})
        for count in COUNTS
        for c, color in enumerate(colors)
        for s, shape in enumerate(SHAPES)
        if (c + s + count) % 5 == fold
    }
    coloured = [(1, color, shape) for color in COLORS for shape in SHAPES]
    pairs = [frozenset(pair) for pair in combinations(coloured, 2) if pair[0][1] != pair[1][1] and pair[0][2] != pair[1][2]]
    order = torch.randperm(len(pairs), generator=generator(0, "playground split")).tolist()
    share = len(pairs) // 6
    return frozenset(held | {pairs[i] for i in order[share * fold : share * (fold + 1)]})


@cache
def _judged(fold: int) -> tuple[Prompt, ...]:
    """The prompts of `_held_out`'s combinations."""
    # eight placements of each held-out coloured pair would be two thirds of the split; one each keeps the tags even
    kept, seen = [], set()
    for prompt in (p for p in _all_prompts() if combination(p) in _held_out(fold)):
        many = prompt.tag == "position" and "color" in prompt.metadata["include"][0]
        if many and (combination(prompt) in seen or prompt.metadata["include"][0]["position"][0] != RELATIONS[len(seen) % 4]):
            continue
        if many:
            seen.add(combination(prompt))
        kept.append(prompt)
    return tuple(kept)


@cache
def _trained(folds: int) -> tuple[Prompt, ...]:
    """The prompts whose combinations the first so many folds leave."""
    return tuple(p for p in _all_prompts() if not any(combination(p) in _held_out(fold) for fold in range(folds)))


def prompts(split: Literal["train", "test"]) -> list[Prompt]:
    """The prompts of a split, grouped by tag in the order of `TAGS`. The two share no combination."""
    if split not in ("train", "test"):
        raise ValueError(f"split {split!r} is not 'train' or 'test'")
    return list(_judged(0) if split == "test" else _trained(1))


def search_prompts(split: Literal["train", "validation"]) -> list[Prompt]:
    """The training prompts divided once more, to choose settings without the test: no two of the three share a combination."""
    if split not in ("train", "validation"):
        raise ValueError(f"split {split!r} is not 'train' or 'validation'")
    return list(_judged(1) if split == "validation" else _trained(2))


@cache
def _by_text() -> dict[str, Prompt]:
    return {prompt.text: prompt for prompt in _all_prompts()}


def parse(text: str) -> Prompt:
    """The world's prompt for a caption, with its tag and metadata.

    Raises:
        UserError: the caption is not one of the world's.
    """
    try:
        return _by_text()[" ".join(text.lower().split())]
    except KeyError:
        raise UserError(
            f'prompt "{text}": not in the playground\'s grammar; try "three red circles" or "a red circle left of a blue square"'
        ) from None
