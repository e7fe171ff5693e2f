"""Reads a playground image back and says whether it shows its prompt.

Foreground is what differs from the world's background. Each of its connected parts is explained by the
drawn shape that fits best, in the part's own colour, and what the drawing leaves unexplained must be
small at every pixel, in every neighbourhood and in sum; so must be what lies outside of all parts. The
drawing may be a little soft, for images come out of a decoder. The number of objects must be exact. The
verifier is a reward, and a policy looks for its holes: what is not certainly right is wrong, and only
whole objects earn a share of the partial score.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from flowtilt.playground.world import BACKGROUND, COLORS, SHAPES, SIZE, parse, signed_distance
from flowtilt.prompts import Prompt

# Distances are Euclidean in RGB, of at most 1.73; the four colours lie 0.67 to 1.11 apart and 0.62 to 1.05 from the background.
OUTSIDE = 0.25
"""How far values may lie outside [0, 1]: a decoder overshoots by .05, and what is seen is clamped."""
FOREGROUND = 0.22
"""Distance from the background above which a pixel belongs to a part; Gaussian noise of .03 reaches .16."""
SPECK = 0.19
"""Greatest distance from the background of a pixel that is away from all parts."""
HAZE = 0.045
"""The same for the mean of 5x5 pixels: a ghost of an object at a tenth of its strength has more, noise of .03 less than .033."""
GRAIN = 0.07
"""The same for the mean of all such pixels, which a fine pattern raises where the mean of 5x5 cancels it; noise of .03 has .05."""
MIN_PIXELS = 6
"""Smaller parts are specks: nothing of the world, and `SPECK` sees them unless they touch an object's rim."""
MAX_PARTS = 6
"""An image with more parts shows nothing."""
LONGEST = 28
"""Steps from pixel to pixel within a part; the world's own need 20."""
WINDOW = 18
"""Side of the square around a part in which it is judged; the world's own objects, with their rims, need at most 16."""
RADII = (4.4, 5.7)
"""Radius of an object in pixels; the world's own are 4.7 to 5.2, and a soft edge makes them look larger."""
INSET = 5.5
"""Least distance of an object's middle from the border: at least a radius, else the object is cut; the world's own have 6.2."""
FIT = 0.86
"""Least soft intersection over union with the drawing; a circle and a square of one area have .84."""
LEAD = 0.08
"""By how much the drawing's intersection over union must be above that of every other shape: what lies between two shapes is neither."""
HUE = 0.18
"""Greatest distance of an object's inside from its colour; half-way between red and yellow is .34."""
MISFIT = 0.33
"""Greatest distance of a pixel of an object or its rim from the drawing; sharp edges after a decoder have up to .29."""
LOCAL_MISFIT = 0.10
"""The same for the mean of 3x3 pixels, which forgives what blur does to an edge."""
TOTAL_MISFIT = 2.4
"""Greatest sum of the squares of these, in pixels of full contrast; noise of .03 on blurred edges has 1.6."""
CHUNK = 144
"""Images that are read at once: more would leave the cache."""
FLAWS = (
    "outline does not fit",
    "between two shapes",
    "too small or too large",
    "too near the border",
    "edges or inside not clean",
    "of no known colour",
)
"""What an object's tests find wrong, in their order."""
APART = 8.0
"""Pixels by which centres must differ for a relation to hold: those of the world have over 12, objects of one row or column under 4."""


@dataclass(frozen=True)
class Seen:
    """A part that was read: what it is and where its centre is, in pixels; "?" where it is nothing of the world.

    `nearest` is the shape that explains it best, and `flaw` says why it is none of the world's all the same, "" where it is.
    """

    shape: str
    color: str
    x: float
    y: float
    nearest: str = ""
    flaw: str = ""

    @property
    def whole(self) -> bool:
        return "?" not in (self.shape, self.color)

    @property
    def said(self) -> str:
        """red cross; red cross (its edges or its inside are not as drawn)."""
        color = "" if self.color == "?" else f"{self.color} "
        return f"{color}{self.nearest or self.shape}{f' ({self.flaw})' if self.flaw else ''}"


@dataclass(frozen=True)
class Verdict:
    """The judgement of one image.

    Args:
        strict: every part of the prompt is right and nothing else is there.
        partial: the mean share of what is right among count, shapes, colours and relation, in [0, 1]; 1 just where strict.
            Only whole objects count as right, and what else was seen counts against them.
        reasons: what is wrong, in words; empty when strict.
        seen: the objects read from the image.
    """

    strict: bool
    partial: float
    reasons: tuple[str, ...]
    seen: tuple[Seen, ...]


def score(images: Tensor, prompts: Sequence[Prompt | str]) -> Tensor:
    """Strict score of images [N, 3, 32, 32] in [0, 1]: 1 where everything is right, else 0. Returns [N], fp32.

    Raises:
        ValueError: images of another shape or of integers, or not one prompt an image.
        UserError: a prompt that is not of the world's grammar.
    """
    return torch.tensor([float(v.strict) for v in judge(images, prompts)])


def judge(images: Tensor, prompts: Sequence[Prompt | str]) -> list[Verdict]:
    """The verdict on each image, which no other image of the batch influences; arguments and errors as for `score`."""
    if images.shape != (len(prompts), 3, SIZE, SIZE):
        raise ValueError(f"want images [{len(prompts)}, 3, {SIZE}, {SIZE}], one a prompt, got {list(images.shape)}")
    known = [parse(p if isinstance(p, str) else p.text) for p in prompts]
    return [_compare(seen, prompt) for seen, prompt in zip(read(images), known, strict=True)]


def read(images: Tensor) -> list[tuple[Seen, ...] | None]:
    """The parts of each image [N, 3, 32, 32]; None where the background is not the world's, or too much lies about."""
    if not images.is_floating_point():
        raise ValueError(f"want images of floats in [0, 1], got {images.dtype}")
    return [seen for chunk in images.detach().float().cpu().split(CHUNK) if len(chunk) for seen in _read(chunk)]


def _read(images: Tensor) -> list[tuple[Seen, ...] | None]:
    # comparisons with NaN are false, so this refuses it too
    valid = ((images >= -OUTSIDE) & (images <= 1 + OUTSIDE)).flatten(1).all(1)
    images = torch.where(valid[:, None, None, None], images, 0).clamp(0, 1)
    offset = images - torch.tensor(BACKGROUND)[None, :, None, None]
    distance = offset.square().sum(1).sqrt()
    labels, whole = _components(distance > FOREGROUND)
    parts, large = _parts(labels)
    good = valid & whole & _plain(offset, distance, large) & (torch.bincount(parts.image, minlength=len(images)) <= MAX_PARTS)
    parts = _Parts(*(column[good[parts.image]] for column in parts))
    found: list[list[Seen]] = [[] for _ in images]
    for i, seen in zip(parts.image.tolist(), _identify(offset, labels * large, parts), strict=True):
        found[i].append(seen)
    return [tuple(seen) if ok else None for seen, ok in zip(found, good.tolist(), strict=True)]


def _components(mask: Tensor) -> tuple[Tensor, Tensor]:
    """Labels [N, H, W] of the 4-connected parts of masks: a part's greatest pixel number, 0 outside. Also whether none is too long, [N]."""
    n, h, w = mask.shape
    # with an empty last row and column, neighbours are neighbours in memory too and no step leaves its row or image
    flat = F.pad(mask, (0, 1, 0, 1)).flatten().short()
    labels = flat * torch.arange(1, (h + 1) * (w + 1) + 1, dtype=torch.int16).repeat(n)
    last = labels
    for _ in range(LONGEST):
        last, labels = labels, labels.clone()
        for step in (1, w + 1):
            torch.maximum(labels[step:], last[:-step], out=labels[step:])
            torch.maximum(labels[:-step], last[step:], out=labels[:-step])
        labels *= flat
        if torch.equal(labels, last):
            break
    whole = (labels == last).view(n, -1).all(1)
    return labels.view(n, h + 1, w + 1)[:, :h, :w].long(), whole


class _Parts(NamedTuple):
    """Connected parts, [M] each: the image, the label, the number of pixels, the pixel nearest the centre."""

    image: Tensor
    label: Tensor
    pixels: Tensor
    row: Tensor
    column: Tensor


def _parts(labels: Tensor) -> tuple[_Parts, Tensor]:
    """The parts that are no specks, and the mask [N, H, W] of their pixels."""
    n = len(labels)
    step = (SIZE + 1) ** 2 + 1
    keys = labels + step * torch.arange(n)[:, None, None]
    at = labels.nonzero()
    key = keys[tuple(at.T)]
    pixels, rows, columns = (torch.bincount(key, weights, n * step) for weights in (None, at[:, 1], at[:, 2]))
    found = (pixels >= MIN_PIXELS).nonzero()[:, 0]
    row, column = ((sums[found] / pixels[found]).round().long() for sums in (rows, columns))
    return _Parts(found // step, found % step, pixels[found], row, column), (pixels >= MIN_PIXELS)[keys]


def _plain(offset: Tensor, distance: Tensor, large: Tensor) -> Tensor:
    """Whether the pixels away from all parts are the background's, [N]."""
    away = (~_dilate(_dilate(large))).float()
    distance = (distance * away).flatten(1)
    haze = _box_sum(offset * away[:, None], 5).square().sum(1).flatten(1).amax(1).sqrt() / 25
    grain = distance.sum(1) / away.flatten(1).sum(1).clamp_min(1)
    return (distance.amax(1) < SPECK) & (haze < HAZE) & (grain < GRAIN)


def _dilate(mask: Tensor) -> Tensor:
    """Masks [N, H, W], grown by a pixel, diagonals too."""
    rows = mask.clone()
    rows[:, 1:] |= mask[:, :-1]
    rows[:, :-1] |= mask[:, 1:]
    grown = rows.clone()
    grown[:, :, 1:] |= rows[:, :, :-1]
    grown[:, :, :-1] |= rows[:, :, 1:]
    return grown


def _box_sum(x: Tensor, side: int) -> Tensor:
    """Sums over the squares inside the last two axes."""
    for axis in (-2, -1):
        kept = x.shape[axis] - side + 1
        total = x.narrow(axis, 0, kept).clone()
        for k in range(1, side):
            total += x.narrow(axis, k, kept)
        x = total
    return x


def _identify(offset: Tensor, labels: Tensor, parts: _Parts) -> list[Seen]:
    """Shape, colour and centre of parts, from the images' offset from the background and the labels of the parts, specks left out."""
    window, own, others = _windows(offset, labels, parts)
    inside = ~_dilate(~own)
    inside = torch.where(inside.flatten(1).any(1)[:, None, None], inside, own).float()
    color = (window * inside[:, None]).sum((2, 3)) / inside.sum((1, 2))[:, None]
    palette = torch.tensor(list(COLORS.values())) - torch.tensor(BACKGROUND)
    gap, name = (color[:, None] - palette).square().sum(2).sqrt().min(1)

    contrast = color.square().sum(1)
    apart, near = ~_dilate(others), _dilate(own)
    alpha = (window * (color / contrast[:, None])[:, :, None, None]).sum(1) * (near & apart)
    fits = _fit(alpha)
    best = fits.overlap.argmax(1)
    rows = torch.arange(len(best))
    runner_up = fits.overlap.index_put((rows, best), torch.tensor(0.0)).amax(1)
    overlap, radius, drawing = fits.overlap[rows, best], fits.radius[rows, best], fits.drawing[rows, best]
    x, y = parts.column - WINDOW // 2 + fits.x[rows], parts.row - WINDOW // 2 + fits.y[rows, best]

    # two pixels around the part are judged with it, for the blur of its edge; pixels beyond them are background
    misfit = (window - drawing[:, None] * color[:, :, None, None]) * (_dilate(near) & apart)[:, None]
    square = misfit.square().sum(1).flatten(1)
    local = _box_sum(misfit, 3).square().sum(1).flatten(1).amax(1).sqrt() / 9
    drawn = (square.amax(1).sqrt() < MISFIT) & (local < LOCAL_MISFIT) & (square.sum(1) < TOTAL_MISFIT * contrast)
    sized = (radius > RADII[0]) & (radius < RADII[1]) & (own.sum((1, 2)) == parts.pixels)
    placed = torch.minimum(torch.minimum(x, y), SIZE - torch.maximum(x, y)) > INSET
    fitting = overlap > FIT
    alone = overlap - runner_up > LEAD
    shaped = drawn & sized & placed & fitting & alone
    flaws = torch.stack([fitting, alone, sized, placed, drawn, gap < HUE], 1).tolist()
    found = zip(best.tolist(), shaped.tolist(), name.tolist(), (gap < HUE).tolist(), x.tolist(), y.tolist(), flaws, strict=True)
    names = list(COLORS)
    return [
        Seen(SHAPES[s] if s_ok else "?", names[c] if c_ok else "?", x_, y_, SHAPES[s], _flaw(fine))
        for s, s_ok, c, c_ok, x_, y_, fine in found
    ]


def _flaw(fine: Sequence[bool]) -> str:
    """The first of a part's tests that it fails, in words; "" where it passes them all."""
    return next((flaw for flaw, ok in zip(FLAWS, fine, strict=True) if not ok), "")


def _windows(offset: Tensor, labels: Tensor, parts: _Parts) -> tuple[Tensor, Tensor, Tensor]:
    """The squares around parts: offset [M, 3, W, W], the part's pixels and those of others [M, W, W]; background beyond the border."""
    half = WINDOW // 2
    rows = (parts.row[:, None] + torch.arange(WINDOW))[:, :, None]
    columns = (parts.column[:, None] + torch.arange(WINDOW))[:, None, :]
    image = parts.image[:, None, None]
    label = F.pad(labels, (half,) * 4)[image, rows, columns]
    own = label == parts.label[:, None, None]
    colors = F.pad(offset, (half,) * 4).permute(0, 2, 3, 1)[image, rows, columns]
    return colors.permute(0, 3, 1, 2).contiguous(), own, (label > 0) & ~own


class _Fits(NamedTuple):
    """How the shapes S explain parts: intersection over union, radius, drawing [M, S, W, W], and the middles of their boxes."""

    overlap: Tensor
    radius: Tensor
    drawing: Tensor
    x: Tensor
    y: Tensor


def _fit(alpha: Tensor) -> _Fits:
    """Draws every shape with the area and the centroid of each part [M, W, W], as soft as explains the part best."""
    grid = torch.arange(WINDOW) + 0.5
    area = alpha.sum((1, 2)).clamp_min(1)
    x = (alpha.sum(1) * grid).sum(1) / area
    middle = (alpha.sum(2) * grid).sum(1) / area
    made = []
    for shape, (unit_area, low) in _GEOMETRY.items():
        radius = (area / unit_area).sqrt()
        y = middle - low * radius
        drawing = _draw(shape, grid[None, None, :] - x[:, None, None], grid[None, :, None] - y[:, None, None], radius[:, None, None])
        softer = _soften(drawing) - drawing
        share = ((alpha - drawing) * softer).sum((1, 2)) / softer.square().sum((1, 2)).clamp_min(1e-6)
        drawing = drawing + share.clamp(0, 1.2)[:, None, None] * softer
        both, differ = area + drawing.sum((1, 2)), (alpha - drawing).abs().sum((1, 2))
        made.append(((both - differ) / (both + differ), radius, drawing, y))  # sums of minimum and maximum
    overlap, radius, drawing, y = (torch.stack(column, 1) for column in zip(*made, strict=True))
    return _Fits(overlap, radius, drawing, x, y)


def _draw(shape: str, dx: Tensor, dy: Tensor, radius: Tensor) -> Tensor:
    """The world's antialiasing, at any pixels."""
    return (0.5 - signed_distance(shape, dx, dy, radius)).clamp(0, 1)


def _soften(drawing: Tensor) -> Tensor:
    """Blurs drawings [M, W, W] by .6 pixels."""
    for axis in (1, 2):
        inner, source = WINDOW - 1, drawing
        drawing = 0.64 * source
        drawing.narrow(axis, 1, inner).add_(source.narrow(axis, 0, inner), alpha=0.18)
        drawing.narrow(axis, 0, inner).add_(source.narrow(axis, 1, inner), alpha=0.18)
    return drawing


def _unit_geometry(shape: str) -> tuple[float, float]:
    """Area / radius² of a shape, and how far below its box's middle its centroid lies / radius."""
    radius = torch.tensor(5.0)
    grid = torch.arange(SIZE) + 0.5 - SIZE / 2
    drawing = _draw(shape, grid[None, :], grid[:, None], radius)
    area = drawing.sum()
    return float(area / radius**2), float((drawing * grid[:, None]).sum() / area / radius)


_GEOMETRY = {shape: _unit_geometry(shape) for shape in SHAPES}


def _compare(seen: tuple[Seen, ...] | None, prompt: Prompt) -> Verdict:
    """Compares what was read with what a prompt's `include` asks for."""
    if seen is None:
        return Verdict(False, 0.0, ("not a picture of this world",), ())
    if not seen:
        return Verdict(False, 0.0, ("empty",), ())
    include: list[dict[str, Any]] = prompt.metadata["include"]
    wanted = [(entry.get("color"), entry["class"]) for entry in include for _ in range(entry["count"])]
    size = max(len(wanted), len(seen))
    whole = [o for o in seen if o.whole]
    counted = (
        f"{len(seen)} {'object' if len(seen) == 1 else 'objects'}, not {len(wanted)}"
        if len(seen) != len(wanted)
        else "not drawn well: " + ", ".join(o.said for o in seen if not o.whole)
    )
    shares = [(float(len(whole) == len(seen) == len(wanted)), counted)]
    shapes = _matched([(None, shape) for _, shape in wanted], whole)
    guessed = [replace(o, shape=o.nearest or o.shape) for o in seen]
    # an object that is only badly drawn is said once, not again as a wrong shape or colour
    right_shapes = len(_matched([(None, shape) for _, shape in wanted], guessed)) == size
    shares.append((len(shapes) / size, "" if right_shapes else "shapes " + ", ".join(o.shape for o in guessed)))
    if any(color for color, _ in wanted):
        colours = "" if len(_matched(wanted, guessed)) == size else "colours " + ", ".join(f"{o.color} {o.shape}" for o in guessed)
        shares.append((len(_matched(wanted, whole)) / size, colours))
    for entry in include:
        if "position" in entry:
            relation, other = entry["position"]
            # among more objects some pair nearly always stands right
            holds = size == 2 and _relation_holds(relation, entry, include[other], whole)
            shares.append((float(holds), f"not {relation}"))
    reasons = tuple(why for share, why in shares if share < 1 and why)
    return Verdict(all(share >= 1 for share, _ in shares), sum(share for share, _ in shares) / len(shares), reasons, seen)


def _matched(wanted: list[tuple[str | None, str]], seen: Sequence[Seen]) -> list[Seen]:
    """The objects that satisfy distinct wants."""
    left, found = list(seen), []
    for color, shape in wanted:
        match = next((o for o in left if o.shape == shape and color in (None, o.color)), None)
        if match:
            left.remove(match)
            found.append(match)
    return found


def _relation_holds(relation: str, first: dict[str, Any], second: dict[str, Any], seen: Sequence[Seen]) -> bool:
    a = _matched([(first.get("color"), first["class"])], seen)
    b = _matched([(second.get("color"), second["class"])], seen)
    if not a or not b:
        return False
    right, down = a[0].x - b[0].x, a[0].y - b[0].y
    return {"left of": -right, "right of": right, "above": -down, "below": down}[relation] > APART
