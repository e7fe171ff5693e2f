"""A smooth stand-in for the playground's verifier, for back-propagation alone: no score that is reported.

How probable is it that an image shows its prompt? Each quadrant holds nothing, one of the sixteen coloured
shapes somewhere around its middle, or something else. A drawing whose squared error is E weighs
(1 + E)^-3, as under Student's t: a wrong shape keeps a slope however wrong it is, where a Gaussian's either
vanishes or rewards whatever is unlike the rivals. Weights over their sum are shares of belief, and those of the
layouts that fit the prompt add up. Everything is smooth in the pixels; there is no argmax and no threshold.

It is not the verifier, which finds parts wherever they are and forgives no ghost. What climbs this on pixels
will find its holes; what climbs it through a decoder, on latents, mostly draws the objects (docs/reference/rewards.md).
"""

from collections.abc import Sequence
from functools import cache
from itertools import permutations
from typing import Any

import torch
from torch import Tensor

from flowtilt.playground.world import BACKGROUND, COLORS, JITTER, RADIUS, SHAPES, SIZE, parse, signed_distance
from flowtilt.prompts import Prompt

POWER = 3
"""Exponent of a drawing's weight; at 4 good images score nearer to 1, and ascent made far fewer images right."""
PLACES = 7
"""Positions of a drawing an axis, .6 pixels apart: a true object between them has an E of about 1, at most 3.5."""
OTHER = 5.0
"""Squared error of "something else", which all drawings must beat: else what looks like nothing is the least bad of them."""
_SIDE = SIZE // 2
_MOST = 12
"""Layouts of a prompt, at most: two different objects in four quadrants."""


def score(images: Tensor, prompts: Sequence[Prompt | str]) -> Tensor:
    """Fourth root of the belief that each image shows its prompt: a mean over quadrants, so that one wrong one does not hide the others.

    Args:
        images: [N, 3, 32, 32] in [0, 1].

    Returns:
        [N] in (0, 1), fp32 (fp64 of fp64), with a gradient to the images.

    Raises:
        ValueError: images of another shape, or not one prompt an image.
        UserError: a prompt that is not of the world's grammar.
    """
    if images.shape != (len(prompts), 3, SIZE, SIZE):
        raise ValueError(f"want images [{len(prompts)}, 3, {SIZE}, {SIZE}], one a prompt, got {list(images.shape)}")
    if not prompts:
        return images.new_zeros(0)
    asked = [_asked(parse(p if isinstance(p, str) else p.text)) for p in prompts]
    layouts, valid, wanted = (torch.stack(column).to(images.device) for column in zip(*asked, strict=True))
    empty, objects = weights(images)
    total = empty + objects.sum(2) + (1 + OTHER) ** -POWER
    belief = torch.stack([empty, *(objects[:, :, None] * wanted[:, None]).sum(3).unbind(2)], 2) / total[:, :, None]
    # [N, layouts, quadrants]: of each quadrant the belief that it holds what the layout has there
    each = belief.log()[:, None].expand(-1, _MOST, -1, -1).gather(3, layouts[..., None])[..., 0]
    return (each.sum(2).masked_fill(~valid, -torch.inf).logsumexp(1) / 4).exp()


def weights(images: Tensor) -> tuple[Tensor, Tensor]:
    """(1 + E)^-3 of nothing [N, 4] and of each coloured shape [N, 4, 16], added up over positions, in each quadrant.

    E is the sum of the squared differences between a quadrant's pixels and the drawing. Colours are in the order of
    `COLORS`, of each all `SHAPES`; quadrants are 0 1 / 2 3.
    """
    dtype = torch.promote_types(images.dtype, torch.float32)
    background = torch.tensor(BACKGROUND, dtype=dtype, device=images.device)
    palette = torch.tensor(list(COLORS.values()), dtype=dtype, device=images.device) - background
    masks = _masks().to(images.device, dtype)
    offset = images.to(dtype) - background[:, None, None]
    quadrants = offset.unflatten(3, (2, _SIDE)).unflatten(2, (2, _SIDE)).permute(0, 2, 4, 1, 3, 5).flatten(4).flatten(1, 2)
    left = quadrants.square().sum((2, 3))
    # |p - m c|² = |p|² - 2 m (p c) + |m|² |c|²
    drawn = (palette @ quadrants) @ (-2 * masks.T)
    error = drawn + left[:, :, None, None] + palette.square().sum(1)[:, None] * masks.square().sum(1)
    places = (1 + error).pow(-POWER).unflatten(3, (len(SHAPES), -1))
    return (1 + left).pow(-POWER), places.sum(4).flatten(2)


@cache
def _masks() -> Tensor:
    """Coverage [shapes * places, 16 * 16] of a quadrant by each shape at each place."""
    grid = torch.arange(_SIDE) + 0.5 - _SIDE / 2
    shifts = torch.linspace(-JITTER, JITTER, PLACES)
    dx = (grid - shifts[:, None])[None, :, None, :]
    dy = (grid - shifts[:, None])[:, None, :, None]
    radius = torch.tensor(sum(RADIUS) / 2)
    made = [(0.5 - signed_distance(shape, dx, dy, radius)).clamp(0, 1) for shape in SHAPES]
    return torch.stack(made).flatten(3).flatten(0, 2)


def _asked(prompt: Prompt) -> tuple[Tensor, Tensor, Tensor]:
    """What a prompt's `include` asks for.

    Returns:
        The layouts that fit [12, 4], a quadrant's 0 for nothing, 1 and 2 for the entries; which of them are any [12];
        the coloured shapes that fit each entry [2, 16], 0 or 1.
    """
    include: list[dict[str, Any]] = prompt.metadata["include"]
    counts = tuple(entry["count"] for entry in include)
    relation = next((entry["position"][0] for entry in include if "position" in entry), None)
    named = tuple((entry.get("color"), entry["class"]) for entry in include)
    return (*_layouts(counts, relation), _wanted(named))


@cache
def _layouts(counts: tuple[int, ...], relation: str | None) -> tuple[Tensor, Tensor]:
    """As the verifier, which asks for no reading order: any quadrants, but for those that a relation excludes."""
    held = [entry + 1 for entry, count in enumerate(counts) for _ in range(count)]
    found = sorted(set(permutations(held + [0] * (4 - len(held)))))
    if relation:
        found = [layout for layout in found if _stands(relation, layout.index(1), layout.index(2))]
    layouts = torch.tensor([*found, *[(0, 0, 0, 0)] * (_MOST - len(found))])
    return layouts, torch.arange(_MOST) < len(found)


def _stands(relation: str, first: int, second: int) -> bool:
    right, down = first % 2 - second % 2, first // 2 - second // 2
    return {"left of": -right, "right of": right, "above": -down, "below": down}[relation] > 0


@cache
def _wanted(named: tuple[tuple[str | None, str], ...]) -> Tensor:
    rows = [[float(shape == s and color in (None, c)) for c in COLORS for s in SHAPES] for color, shape in named]
    return torch.tensor((rows * 2)[:2])  # of a second entry that is none no layout asks, but its logarithm must be finite
