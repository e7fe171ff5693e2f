"""The verifier is right on drawn scenes, soft or noisy ones too, and gives nothing to pictures that only look well to a careless one."""

from collections.abc import Callable, Sequence

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from flowtilt.errors import UserError
from flowtilt.playground import verify, world
from flowtilt.playground.world import BACKGROUND, COLORS, SHAPES, SIZE, Object
from flowtilt.prompts import Prompt
from flowtilt.seeding import generator

EVERY = world.prompts("train") + world.prompts("test")
BLANK = torch.tensor(BACKGROUND)[:, None, None].expand(3, SIZE, SIZE)
PAINT = {name: torch.tensor(value)[:, None, None] for name, value in COLORS.items()}
NEXT = dict(zip(COLORS, [*list(COLORS)[1:], "red"], strict=True))
Y, X = torch.meshgrid(torch.arange(SIZE) + 0.5, torch.arange(SIZE) + 0.5, indexing="ij")
PIXEL_Y, PIXEL_X = Y.long(), X.long()


def plural(shape: str) -> str:
    return shape + ("es" if shape == "cross" else "s")


def mask(shape: str, x: float = 10.0, y: float = 9.0, radius: float = 5.0) -> Tensor:
    return world.coverage(shape, *(torch.tensor([value]) for value in (x, y, radius)))[0]


def over(image: Tensor, alpha: Tensor | float, color: Tensor) -> Tensor:
    return image + alpha * (color - image)


def blur(images: Tensor, sigma: float) -> Tensor:
    taps = torch.exp(-(torch.arange(-6, 7.0) ** 2) / (2 * sigma**2))
    kernel = (taps / taps.sum()).view(1, 1, 1, -1).repeat(3, 1, 1, 1)
    rows = F.conv2d(F.pad(images, (6, 6, 6, 6), "replicate"), kernel, groups=3)
    return F.conv2d(rows, kernel.transpose(2, 3), groups=3)


def noisy(images: Tensor, sd: float) -> Tensor:
    return images + sd * torch.randn(images.shape, generator=generator(0, "test verify noise"))


def partials(images: Tensor, captions: Sequence[Prompt | str]) -> Tensor:
    return torch.tensor([v.partial for v in verify.judge(images, captions)])


@pytest.fixture(scope="module")
def drawn() -> tuple[Tensor, list[Prompt], list[list[Object]]]:
    """5,000 scenes: every prompt of the world, six times."""
    rng = generator(0, "test verify")
    prompts = [EVERY[k % len(EVERY)] for k in range(5000)]
    scenes = [world.arrange(p, rng) for p in prompts]
    return world.render(scenes), prompts, scenes


# ---- right on the world's own pictures


def test_5000_drawn_scenes_show_their_captions(drawn):
    images, prompts, _ = drawn
    assert verify.score(images, prompts).mean() >= 0.999


def test_what_is_read_is_what_was_drawn(drawn):
    images, _, scenes = drawn
    for seen, scene in zip(verify.read(images[:800]), scenes[:800], strict=True):
        assert seen is not None and len(seen) == len(scene)
        for o in scene:
            nearest = min(seen, key=lambda s: (s.x - o.x) ** 2 + (s.y - o.y) ** 2)
            assert (nearest.shape, nearest.color) == (o.shape, o.color)
            assert abs(nearest.x - o.x) < 0.4 and abs(nearest.y - o.y) < 0.4


def reworded(text: str, words: dict[str, str]) -> str:
    return " ".join(filter(None, (words.get(word, word) for word in text.split())))


def differing(prompt: Prompt) -> dict[str, str]:
    """Captions that no scene of the prompt can show, by what differs."""
    entries = prompt.metadata["include"]
    old, new = entries[0]["class"], next(s for s in SHAPES if s not in {entry["class"] for entry in entries})
    colors = [entry["color"] for entry in entries if "color" in entry]
    changes = {"shape": {old: new, plural(old): plural(new)}}
    if len(entries) == 1:
        changes["count"] = {"a": "two", "two": "three", "three": "four", "four": "two"} | {shape: plural(shape) for shape in SHAPES}
    if colors:
        changes["colour"] = {colors[0]: next(c for c in COLORS if c not in colors)}
    if len(colors) == 2:
        changes["binding"] = dict(zip(colors, colors[::-1], strict=True))
    if "position" in entries[0]:
        changes["relation"] = {"left": "right", "right": "left", "above": "below", "below": "above"}
    return {what: reworded(prompt.text, words) for what, words in changes.items()}


@pytest.mark.parametrize("what", ["shape", "count", "colour", "binding", "relation"])
def test_no_drawn_scene_shows_a_caption_that_differs(drawn, what):
    images, prompts, _ = drawn
    wrong = [differing(p).get(what) for p in prompts]
    rows = [i for i, text in enumerate(wrong) if text][:2500]
    assert len(rows) > 400
    verdicts = verify.judge(images[rows], [wrong[i] for i in rows])
    assert not any(v.strict for v in verdicts) and all(v.reasons and v.partial < 1 for v in verdicts)


def test_jitter_within_a_row_is_no_relation():
    image = world.render([[Object("circle", "red", 9.0, 6.2, 5.0), Object("square", "blue", 24.0, 9.8, 5.0)]])
    assert not verify.score(image.expand(2, -1, -1, -1), ["a circle above a square", "a square below a circle"]).any()


@pytest.mark.parametrize(("sigma", "sd"), [(0, 0.03), (0.3, 0), (0.6, 0), (0.6, 0.03)])
def test_decoder_noise_and_soft_edges_pass(drawn, sigma, sd):
    images = blur(drawn[0][:2000], sigma) if sigma else drawn[0][:2000]
    assert verify.score(noisy(images, sd), drawn[1][:2000]).mean() >= 0.99


def test_strong_blur_and_strong_noise_do_not_pass(drawn):
    images, prompts, _ = drawn
    assert verify.score(blur(images[:500], 1.4), prompts[:500]).mean() < 0.01
    assert verify.score(noisy(images[:500], 0.07), prompts[:500]).mean() < 0.01


# ---- degenerate pictures; each makes one from a shape and a colour, and is judged by "a red circle" and the like


def scene(shape: str, color: str, alpha: float = 1.0, **place: float) -> Tensor:
    return over(BLANK, alpha * mask(shape, **place), PAINT[color])


def noise(sd: float) -> Tensor:
    return sd * torch.randn(3, SIZE, SIZE, generator=generator(0, "test verify attack"))


def two_tone(shape: str, color: str, share: Tensor) -> Tensor:
    """The object with another colour where `share` is 1."""
    return over(BLANK, mask(shape), over(PAINT[color], share, PAINT[NEXT[color]]))


def between(shape: str, color: str) -> Tensor:
    """The outline half-way to another shape's."""
    pair = (shape, "square" if shape == "circle" else "circle")
    distance = sum(world.signed_distance(name, X - 10, Y - 9, torch.tensor(5.0)) for name in pair) / 2
    return over(BLANK, (0.5 - distance).clamp(0, 1), PAINT[color])


DOTS = ((PIXEL_X % 3 == 1) & (PIXEL_Y % 3 == 1)).float()
SPOT = (PIXEL_X == 24) & (PIXEL_Y == 24)
DIAMOND = (0.5 - ((X - 10).abs() + (Y - 9).abs() - 6.5) / 2**0.5).clamp(0, 1)
CHECKER = ((PIXEL_X + PIXEL_Y) % 2).float()
MAZE = ((PIXEL_X % 2 == 0) | ((PIXEL_Y == 0) & (PIXEL_X % 4 < 3)) | ((PIXEL_Y == 31) & ((PIXEL_X + 2) % 4 < 3))).float()
FAR = (mask("square", radius=8.0) == 0).float()

Attack = Callable[[str, str], Tensor]

NOTHING_WHOLE: dict[str, Attack] = {
    "blank": lambda s, c: BLANK,
    "black": lambda s, c: 0 * BLANK,
    "white": lambda s, c: 0 * BLANK + 1,
    "one colour all over": lambda s, c: PAINT[c].expand(3, SIZE, SIZE),
    "uniform noise": lambda s, c: torch.rand(3, SIZE, SIZE, generator=generator(0, "test verify uniform")),
    "noise on a blank": lambda s, c: BLANK + noise(0.15),
    "noise on a scene": lambda s, c: scene(s, c) + noise(0.1),
    "all colours at once": lambda s, c: torch.cat([p.expand(3, SIZE, 8) for p in PAINT.values()], 2),
    "colour mush": lambda s, c: BLANK + 0.3 * F.interpolate(noise(1)[None, :, :5, :5], (SIZE, SIZE), mode="bilinear")[0],
    "tiles": lambda s, c: F.avg_pool2d(scene(s, c, x=8.0, y=8.0)[:, :16, :16], 2).repeat(1, 4, 4),
    "a huge shape": lambda s, c: scene(s, c, x=16.0, y=16.0, radius=11.0),
    "a large shape": lambda s, c: scene(s, c, radius=6.6),
    "a small shape": lambda s, c: scene(s, c, radius=3.7),
    "gradient": lambda s, c: over(BLANK, X / SIZE, PAINT[c]),
    "radial gradient": lambda s, c: over(BLANK, torch.exp(-((X - 10) ** 2 + (Y - 9) ** 2) / 30), PAINT[c]),
    "checkerboard of pixels": lambda s, c: over(BLANK, CHECKER, PAINT[c]),
    "checkerboard of 8 pixels": lambda s, c: over(BLANK, ((PIXEL_X // 8 + PIXEL_Y // 8) % 2).float(), PAINT[c]),
    "half of another colour": lambda s, c: two_tone(s, c, (X > 10).float()),
    "a quarter of another colour": lambda s, c: two_tone(s, c, (X > 12.5).float()),
    "running into another colour": lambda s, c: two_tone(s, c, ((X - 5) / 10).clamp(0, 1)),
    "stripes of another colour": lambda s, c: two_tone(s, c, (PIXEL_X % 2).float()),
    "between two colours": lambda s, c: two_tone(s, c, torch.tensor(0.4)),
    "a pixel of another colour": lambda s, c: two_tone(s, c, ((PIXEL_X == 10) & (PIXEL_Y == 9)).float()),
    "a rim of another colour": lambda s, c: over(over(BLANK, mask(s, radius=5.2), PAINT[NEXT[c]]), mask(s, radius=4.2), PAINT[c]),
    "grey": lambda s, c: over(BLANK, mask(s), torch.full((3, 1, 1), 0.7)),
    "glued to its like": lambda s, c: over(scene(s, c, x=8.0), mask(s, x=16.0), PAINT[c]),
    "glued to another": lambda s, c: over(scene(s, c, x=8.0), mask("square", x=16.0), PAINT[NEXT[c]]),
    "cut by the left border": lambda s, c: scene(s, c, x=3.5, y=15.0),
    "cut by the lower border": lambda s, c: scene(s, c, x=15.0, y=29.0),
    "half of it": lambda s, c: over(BLANK, mask(s) * (Y < 9.5), PAINT[c]),
    "ring": lambda s, c: over(scene(s, c), mask(s, radius=3.5), BLANK),
    "a hole": lambda s, c: over(scene(s, c), mask("circle", y=9.5, radius=1.6), BLANK),
    "dots in its shape": lambda s, c: over(BLANK, DOTS * mask(s, radius=6.0), PAINT[c]),
    "dots everywhere": lambda s, c: over(BLANK, DOTS, PAINT[c]),
    "maze": lambda s, c: over(BLANK, MAZE, PAINT[c]),
    "faint": lambda s, c: scene(s, c, alpha=0.7),
    "very faint": lambda s, c: scene(s, c, alpha=0.25),
    "blurred": lambda s, c: blur(scene(s, c)[None], 1.5)[0],
    "textured": lambda s, c: scene(s, c) + 0.15 * mask(s) * (2 * CHECKER - 1),
    "stretched": lambda s, c: over(BLANK, F.interpolate(mask(s)[None, None], (SIZE, 44), mode="bilinear")[0, 0, :, :SIZE], PAINT[c]),
    "between two shapes": between,
    "turned": lambda s, c: scene("triangle", c).flip(1) if s == "triangle" else over(BLANK, DIAMOND, PAINT[c]),
    "two shapes at half strength": lambda s, c: over(BLANK, (mask(s) + mask(SHAPES[SHAPES.index(s) - 2])) / 2, PAINT[c]),
    "with a tail": lambda s, c: over(scene(s, c), ((PIXEL_Y == 9) & (X > 10) & (X < 22)).float(), PAINT[c]),
    "inverted": lambda s, c: 1 - scene(s, c),
    "NaN all over": lambda s, c: BLANK * float("nan"),
    "one NaN": lambda s, c: torch.where(SPOT, float("nan"), scene(s, c)),
    "one infinity": lambda s, c: torch.where(SPOT, float("inf"), scene(s, c)),
    "minus infinity all over": lambda s, c: BLANK - float("inf"),
    "overdriven": lambda s, c: scene(s, c) + 0.6 * (scene(s, c) > 0.75),
    "bytes": lambda s, c: 255 * scene(s, c),
    "-1 to 1": lambda s, c: 2 * scene(s, c) - 1,
    # an object that is right, in a picture that is not
    "on another background": lambda s, c: over(scene(s, c) + 0.06, mask(s), PAINT[c]),
    "on a tinted background": lambda s, c: scene(s, c) + torch.tensor([0.0, 0.0, 0.1])[:, None, None] * (1 - mask(s)),
    "on a gradient": lambda s, c: scene(s, c) + 0.25 * (1 - mask(s)) * X / SIZE,
    "on a fine pattern": lambda s, c: scene(s, c) + 0.1 * (2 * CHECKER - 1) * FAR,
    "among dots": lambda s, c: over(scene(s, c), DOTS * FAR, PAINT[c]),
    "among faint dots": lambda s, c: over(scene(s, c), 0.25 * CHECKER * FAR * (X > 18) * (Y > 18), PAINT[c]),
    "with a speck": lambda s, c: over(scene(s, c), SPOT.float(), PAINT[c]),
    "with a line": lambda s, c: over(scene(s, c), (PIXEL_Y == 22).float() * 0.4, PAINT[c]),
    "with a ghost of a second": lambda s, c: over(scene(s, c), 0.1 * mask(s, x=24.0, y=24.0), PAINT[c]),
    "with a faint second": lambda s, c: over(scene(s, c), 0.2 * mask(s, x=24.0, y=24.0), PAINT[c]),
    "with a ghost close by": lambda s, c: over(scene(s, c), 0.2 * mask(s, x=20.5, y=9.0), PAINT[c]),
}

WITH_ANOTHER: dict[str, Attack] = {
    "a black shape": lambda s, c: over(scene(s, c), mask(s, x=24.0, y=24.0) * 0.9, 0 * BLANK),
    "its like": lambda s, c: over(scene(s, c), mask(s, x=24.0, y=24.0), PAINT[c]),
    "its like at half strength": lambda s, c: over(scene(s, c), 0.5 * mask(s, x=24.0, y=24.0), PAINT[c]),
    "another shape of another colour": lambda s, c: over(scene(s, c), mask(SHAPES[SHAPES.index(s) - 1], x=24.0, y=24.0), PAINT[NEXT[c]]),
    "a small dot": lambda s, c: over(scene(s, c), mask("circle", x=24.0, y=24.0, radius=2.0), PAINT[c]),
    "every place filled": lambda s, c: scene(s, c, x=8.0, y=8.0)[:, :16, :16].repeat(1, 2, 2),
}


def made(attack: Attack) -> tuple[Tensor, list[str]]:
    pairs = [(shape, color) for shape in SHAPES for color in COLORS]
    return torch.stack([attack(*pair) for pair in pairs]), [f"a {color} {shape}" for shape, color in pairs]


@pytest.mark.parametrize("name", NOTHING_WHOLE)
def test_a_picture_that_shows_no_whole_object_or_is_none_of_the_world_gets_nothing(name):
    images, captions = made(NOTHING_WHOLE[name])
    for words in ({}, dict.fromkeys(COLORS, ""), {"a": "two"} | {shape: plural(shape) for shape in SHAPES}):
        assert not partials(images, [reworded(text, words) for text in captions]).any()


@pytest.mark.parametrize("name", WITH_ANOTHER)
def test_one_object_and_something_else_are_not_one_object(name):
    images, captions = made(WITH_ANOTHER[name])
    assert not verify.score(images, captions).any()
    assert partials(images, captions).max() <= 0.34


@pytest.mark.parametrize("bad", ["half of another colour", "ring", "faint", "cut by the lower border", "a hole", "blurred"])
def test_a_spoilt_object_among_right_ones_earns_nothing(bad):
    images = over(NOTHING_WHOLE[bad]("circle", "red"), mask("square", x=24.0, y=8.0), PAINT["blue"])[None]
    alone = scene("square", "blue", x=24.0, y=8.0)[None]
    for caption in ("a red circle left of a blue square", "a red circle and a blue square", "a circle and a square"):
        assert not verify.score(images, [caption]).any() and partials(images, [caption]) <= partials(alone, [caption])


def test_everything_at_once_is_little_of_anything():
    places = [(8.0, 8.0), (24.0, 8.0), (8.0, 24.0), (24.0, 24.0)]
    full = world.render([[Object(shape, color, *place, 5.0) for shape, color, place in zip(SHAPES, COLORS, places, strict=True)]])
    fewer = [p for p in EVERY if "four" not in p.text]
    assert partials(full.expand(len(fewer), -1, -1, -1), fewer).max() <= 0.34


# ---- what a search finds

CAPTIONS = ["a circle", "a red circle", "two circles", "three red squares", "a circle and a square", "a red circle left of a blue square"]


def low_frequencies(z: Tensor) -> Tensor:
    return (BLANK + F.interpolate(z, (SIZE, SIZE), mode="bilinear")).clamp(0, 1)


def rectangles(z: Tensor) -> Tensor:
    """Five rectangles of free place, size and colour, painted one over another."""
    images = BLANK.expand(len(z), 3, SIZE, SIZE)
    for x, y, width, height, *color in z.view(len(z), 5, 7)[..., None, None].permute(1, 2, 0, 3, 4):
        inside = ((X - 16 - 8 * x).abs() < 4 * width.exp()) & ((Y - 16 - 8 * y).abs() < 4 * height.exp())
        images = torch.where(inside[:, None], torch.sigmoid(2 * torch.stack(color, 1)), images)
    return images


SEARCHES = {
    "pixels": ((3, SIZE, SIZE), lambda z: (0.5 + 0.3 * z).clamp(0, 1)),
    "4x4": ((3, 4, 4), low_frequencies),
    "8x8": ((3, 8, 8), low_frequencies),
    "rectangles": ((35,), rectangles),
}


@pytest.mark.parametrize("space", SEARCHES)
def test_hill_climbing_on_patterns_finds_no_partial_score(space):
    shape, draw = SEARCHES[space]
    rng = generator(0, "test verify climb")
    z = torch.randn(len(CAPTIONS), *shape, generator=rng)
    best = partials(draw(z), CAPTIONS)
    for step in range(30):
        trial = z + (0.05, 0.2, 0.8)[step % 3] * torch.randn(12, *z.shape, generator=rng)
        found, which = partials(draw(trial.flatten(0, 1)), CAPTIONS * 12).view(12, -1).max(0)
        better = found >= best
        z[better], best[better] = trial[which, torch.arange(len(CAPTIONS))][better], found[better]
    assert best.max() == 0


@pytest.mark.parametrize("cells", [32, 8], ids=["pixels", "8x8"])
def test_what_passes_stays_close_to_the_drawing(cells):
    """A search for the strangest picture that still passes ends near the right one."""
    rng = generator(0, "test verify strange")
    captions = ["a red circle", "a green square", "a yellow triangle", "a blue cross", "a red circle and a blue square"]
    right = world.render([world.arrange(world.parse(text), rng) for text in captions])
    images, reached = right, torch.zeros(len(right))
    for step in range(60):
        change, where = torch.randn(40, 3, cells, cells, generator=rng), torch.rand(40, 1, cells, cells, generator=rng) < 0.1
        change = F.interpolate(change * where, (SIZE, SIZE), mode="bilinear").view(8, *right.shape)
        trial = (images + (0.05, 0.15, 0.5)[step % 3] * change).clamp(0, 1)
        distance = (trial - right).square().sum((2, 3, 4)).sqrt()
        passes = verify.score(trial.flatten(0, 1), captions * 8).view(8, -1) > 0
        best, which = torch.where(passes, distance, 0).max(0)
        images = torch.where((best > reached)[:, None, None, None], trial[which, torch.arange(len(right))], images)
        reached = torch.maximum(reached, best)
    assert (reached > 0.3).all()  # the search did move
    local = F.avg_pool2d(images - right, 3, 1, 1).square().sum(1).sqrt().flatten(1).amax(1)
    assert local.max() < 0.25  # the faintest object has .62


def test_an_image_has_the_same_verdict_alone_and_in_any_batch(drawn):
    images = torch.cat([noisy(drawn[0][:40], 0.03), *(made(attack)[0][:2] for attack in (NOTHING_WHOLE | WITH_ANOTHER).values())])
    captions = [p.text for p in drawn[1][: len(images)]]
    together = verify.judge(images, captions)
    turned = verify.judge(images.flip(0), captions[::-1])[::-1]
    alone = [verify.judge(image[None], [text])[0] for image, text in zip(images, captions, strict=True)]
    for a, b, c in zip(together, turned, alone, strict=True):
        assert (a.strict, a.partial, a.reasons) == (b.strict, b.partial, b.reasons) == (c.strict, c.partial, c.reasons)


def test_the_images_are_left_as_they_are_and_need_be_no_leaves():
    images = (torch.rand(2, 3, SIZE, SIZE, requires_grad=True) * 3 - 1).bfloat16()
    before = images.clone()
    scores = verify.score(images, ["a circle", "a square"])
    assert torch.equal(images, before) and scores.dtype == torch.float32 and not scores.requires_grad


def test_no_images_have_no_scores():
    assert verify.score(torch.empty(0, 3, SIZE, SIZE), []).shape == (0,)


@pytest.mark.parametrize("shape", [(2, 3, 16, 16), (2, 1, SIZE, SIZE), (3, SIZE, SIZE), (1, 3, SIZE, SIZE), (3, 3, SIZE, SIZE)])
def test_images_of_another_shape_or_number_are_refused(shape):
    with pytest.raises(ValueError, match=r"want images \[2, 3, 32, 32\], one a prompt, got \["):
        verify.score(torch.zeros(shape), ["a circle", "a square"])


def test_integer_images_are_refused():
    with pytest.raises(ValueError, match=r"want images of floats in \[0, 1\], got torch.uint8"):
        verify.score(torch.zeros(1, 3, SIZE, SIZE, dtype=torch.uint8), ["a circle"])


@pytest.mark.parametrize("prompt", ["a photo of a dog", Prompt("a photo of a dog"), Prompt("", "", {"include": []})])
def test_a_caption_that_the_world_lacks_is_a_user_error(prompt):
    with pytest.raises(UserError, match="not in the playground's grammar"):
        verify.score(BLANK[None], [prompt])


def test_a_prompt_is_judged_by_its_caption_not_by_metadata_that_came_with_it():
    assert verify.score(scene("circle", "red")[None], [Prompt("a red circle", "", {"include": []})]) == 1
