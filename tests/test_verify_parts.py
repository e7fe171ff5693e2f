"""What partial scores and verdicts of the verifier say."""

import pytest
import torch
from test_verify import BLANK, EVERY, partials
from torch import Tensor

from flowtilt.playground import verify, world
from flowtilt.playground.world import COLORS, SHAPES, SIZE, Object
from flowtilt.seeding import generator


def test_partial_is_one_exactly_where_strict_is():
    rng = generator(0, "test verify messy")
    rand = torch.rand(3000, 4, 5, generator=rng).tolist()
    scenes = [
        [Object(SHAPES[int(4 * a)], list(COLORS)[int(4 * b)], 4 + 24 * c, 4 + 24 * d, 4 + 2 * e) for a, b, c, d, e in objects[: 1 + k % 4]]
        for k, objects in enumerate(rand)
    ]
    few = [p.text for p in EVERY if p.tag in ("single_object", "two_object") or "three" in p.text]
    verdicts = verify.judge(world.render(scenes), [few[k % len(few)] for k in range(len(scenes))])
    assert all(v.strict == (v.partial == 1.0) == (not v.reasons) and 0 <= v.partial <= 1 for v in verdicts)
    assert 5 < sum(v.strict for v in verdicts) < 1000


def test_partial_grows_with_what_is_right():
    circle, square = ("circle", "red"), ("square", "blue")
    scenes = [[("cross", "green")], [circle], [("circle", "green"), square], [square, circle], [circle, square]]
    images = world.render([[Object(*what, x, 8.0, 5.0) for what, x in zip(scene, (8.0, 24.0), strict=False)] for scene in scenes])
    steps = partials(images, ["a red circle left of a blue square"] * len(scenes)).tolist()
    assert steps == sorted(set(steps)) and steps[-1] == 1


def test_the_verdict_says_what_is_wrong_in_words():
    images = world.render([[Object("circle", "red", 8, 8, 5), Object("square", "blue", 24, 8, 5)]])
    (verdict,) = verify.judge(images, ["a red circle right of a blue square"])
    assert verdict.reasons == ("not right of",)
    assert verify.judge(images, ["three circles"])[0].reasons == ("2 objects, not 3", "shapes circle, square")
    assert verify.judge(BLANK[None], ["a circle"])[0].reasons == ("empty",)
    assert verify.judge(BLANK[None] + 1, ["a circle"])[0].reasons == ("not a picture of this world",)
    assert verify.judge(images, ["a circle"])[0].reasons[0] == "2 objects, not 1"


def _pixel(row: int, column: int) -> Tensor:
    return (torch.arange(SIZE) == row)[:, None] & (torch.arange(SIZE) == column)


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (lambda x: world.render([[Object("cross", "red", 12, 12, 6.5)]]), "red cross (too small or too large)"),
        (lambda x: world.render([[Object("cross", "red", 12, 4.6, 5)]]), "red cross (too near the border)"),
        (lambda x: torch.where(_pixel(12, 12), x * 0.5, x), "red cross (edges or inside not clean)"),
        (lambda x: torch.where(torch.arange(SIZE) == 12, torch.where(x > 0.5, x * 0.6, x), x), "red cross (outline does not fit)"),
    ],
)
def test_an_object_of_the_right_kind_that_is_not_accepted_says_why(change, why):
    """Once, and not again as a shape or a colour that is wrong."""
    fine = world.render([[Object("cross", "red", 12, 12, 5)]])
    assert verify.judge(fine, ["a red cross"])[0].strict
    (verdict,) = verify.judge(change(fine), ["a red cross"])
    assert not verdict.strict and verdict.partial < 1 and verdict.reasons == (f"not drawn well: {why}",)
