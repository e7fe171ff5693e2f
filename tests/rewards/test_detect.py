"""From an image to its objects: mmdetection's resize and padding, and its rule for classes, masks, boxes and scores."""

import json
import math
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from test_mask2former import GOLDEN as TINY
from test_mask2former import use_tiny

from flowtilt.errors import UserError
from flowtilt.rewards.geneval import detect
from flowtilt.rewards.geneval.detect import Detection, Detector, detections, prepare, resized

POST = Path(__file__).parent / "golden" / "mask2former_post.safetensors"
"""Random logits of 100 queries and 80 classes, and mmdetection 2.28.2's detections of them."""


def grey_levels(pixels: torch.Tensor) -> torch.Tensor:
    return pixels * torch.tensor(detect.STD)[:, None, None] + torch.tensor(detect.MEAN)[:, None, None]


def described(found: list[Detection]) -> list[tuple]:
    return [(o.label, o.score, o.box, o.mask.tolist()) for o in found]


# the network's input ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("size", "wanted"),
    [
        ((512, 512), (800, 800)),
        ((1024, 1024), (800, 800)),
        ((800, 1333), (800, 1333)),
        ((480, 640), (800, 1067)),  # 1066.67
        ((300, 600), (667, 1333)),  # 666.5: halves round up
        ((100, 400), (333, 1333)),  # 333.25
        ((4000, 10), (1333, 3)),
        ((1, 1), (800, 800)),
        ((1, 4000), (1, 1333)),  # a third of a pixel: never none
    ],
)
def test_an_image_grows_or_shrinks_until_800_or_1333_is_reached(size, wanted):
    assert resized(*size) == wanted and resized(*size[::-1]) == wanted[::-1]


@pytest.mark.parametrize("side", [512, 1024])
def test_square_images_become_800_squares_without_padding(side):
    pixels, valid = prepare(torch.full((1, 3, side, side), 0.2))
    assert valid == (800, 800) and pixels.shape == (1, 3, 800, 800)
    torch.testing.assert_close(grey_levels(pixels), torch.full_like(pixels, 51.0), atol=1e-4, rtol=0)


def test_padding_is_mid_grey_at_the_right_and_bottom():
    pixels, valid = prepare(torch.ones(1, 3, 48, 64))
    levels = grey_levels(pixels)[0]
    assert valid == (800, 1067) and levels.shape == (3, 800, 1088)
    torch.testing.assert_close(levels[:, :, :1067], torch.full((3, 800, 1067), 255.0), atol=1e-4, rtol=0)
    torch.testing.assert_close(levels[:, :, 1067:], torch.full((3, 800, 21), 128.0), atol=1e-4, rtol=0)
    upright = grey_levels(prepare(torch.ones(1, 3, 64, 48))[0])[0]
    torch.testing.assert_close(upright, levels.transpose(1, 2))


def test_enlarging_is_bilinear_in_whole_grey_levels():
    """Twice as large, a pixel's centre lies a quarter of the way to its neighbour."""
    levels = torch.zeros(400, 400)
    levels[:, 200:] = 90
    pixels, _ = prepare((levels / 255).expand(1, 3, -1, -1))
    row = grey_levels(pixels)[0, 1, 7, 398:403]
    torch.testing.assert_close(row, torch.tensor([0.0, 22.0, 68.0, 90.0, 90.0]), atol=1e-4, rtol=0)  # 22.5 and 67.5, half to even


def test_shrinking_looks_at_the_two_nearest_pixels_only():
    """A quarter as large, the centre lies between the second and the third of four pixels; an average would be grey."""
    stripes = torch.tensor([0.0, 1.0, 1.0, 0.0]).repeat(1333).expand(1, 3, 32, -1)
    pixels, valid = prepare(stripes)
    assert valid == (8, 1333)
    torch.testing.assert_close(grey_levels(pixels)[..., :8, :1333], torch.full((1, 3, 8, 1333), 255.0), atol=1e-4, rtol=0)


def test_images_are_rounded_to_8_bits_first():
    image = torch.full((1, 3, 8, 8), 100.4 / 255)
    assert torch.equal(prepare(image)[0], prepare(torch.full_like(image, 100 / 255))[0])


def test_flipping_swaps_red_and_blue_but_not_their_statistics():
    image = torch.tensor([1.0, 0.4, 0.2]).view(1, 3, 1, 1).expand(1, 3, 8, 8)
    assert torch.allclose(grey_levels(prepare(image, flip=True)[0])[0, :, 5, 5], torch.tensor([51.0, 102.0, 255.0]), atol=1e-4)
    assert torch.equal(prepare(image, flip=True)[0], prepare(image.flip(1))[0])


# detections ------------------------------------------------------------------------------------------


def from_golden(threshold: float) -> list[Detection]:
    case = load_file(POST)
    return detections(
        case["in.class_logits"], case["in.mask_logits"], padded=(96, 128), valid=(90, 120), size=(67, 89), threshold=threshold
    )


def same_as(found: list[Detection], rows: torch.Tensor, masks: torch.Tensor, *, rtol: float = 0, atol: float = 0) -> None:
    """mmdetection lists by class; boxes and scores tell those of one class apart."""
    ours = sorted(found, key=lambda o: (o.label, *o.box, o.score))
    order = sorted(range(len(rows)), key=lambda i: rows[i].tolist())
    assert len(ours) == len(rows)
    for o, i in zip(ours, order, strict=True):
        assert o.label == rows[i, 0] and list(o.box) == rows[i, 1:5].tolist()
        assert math.isclose(o.score, rows[i, 5].item(), rel_tol=rtol, abs_tol=atol)
        assert o.mask.dtype == torch.bool and torch.equal(o.mask, masks[i].bool())


def test_all_hundred_detections_are_mmdetections():
    case = load_file(POST)
    # exponentials and sums of fp32 end in other last bits on another kind of CPU; boxes and masks do not
    same_as(from_golden(-1), case["out.dets"], case["out.masks"], rtol=4 * torch.finfo(torch.float32).eps)


def test_the_tiny_network_detects_what_mmdetections_does():
    case = load_file(TINY)
    with safe_open(TINY, "pt") as file:
        info = json.loads(file.metadata()["info"])
    sizes = {"padded": info["padded"], "valid": info["valid"], "size": info["original"], "most": info["max_per_image"]}
    found = detections(case["out.class_logits"][0], case["out.mask_logits"][0], threshold=-1, **sizes)
    same_as(found, case["out.dets"], case["out.masks"], atol=1e-6)


def test_the_best_come_first_and_the_threshold_is_strict():
    found = from_golden(-1)
    assert all(a.score >= b.score for a, b in pairwise(found))
    for threshold in (0.0, 0.3, 0.5, found[10].score, found[3].score):
        assert described(from_golden(threshold)) == described([o for o in found if o.score > threshold])
    assert len(from_golden(0.3)) == 12 and len(from_golden(found[3].score)) == 3 and from_golden(0.999) == []


def test_a_threshold_is_met_in_fp32():
    """As a score of 0.3, in fp32 a little above 0.3, is not greater than 0.3."""
    mask, low = torch.full((1, 8, 8), 40.0), torch.log(torch.tensor([[0.3, 0.7]]))
    sizes = {"padded": (8, 8), "valid": (8, 8), "size": (8, 8)}
    score = detections(low, mask, threshold=0, **sizes)[0].score
    nearest = torch.tensor(score).item()
    assert detections(low, mask, threshold=nearest, **sizes) == []
    assert detections(low, mask, threshold=nearest + 1e-10, **sizes) == []  # rounds to the same fp32
    assert len(detections(low, mask, threshold=nearest - 1e-6, **sizes)) == 1


def test_a_box_lies_closely_around_its_mask():
    for o in from_golden(0):
        x1, y1, x2, y2 = map(int, o.box)
        assert o.mask[y1:y2, x1:x2].sum() == o.mask.sum() > 0
        assert all(o.mask[y1:y2, x1:x2].select(axis, end).any() for axis in (0, 1) for end in (0, -1))


def block(logit: float) -> torch.Tensor:
    """A mask logit [8, 10] that is positive in rows 2 … 4 and columns 3 … 8."""
    mask = torch.full((8, 10), -3.0)
    mask[2:5, 3:9] = logit
    return mask


SAME = {"padded": (8, 10), "valid": (8, 10), "size": (8, 10)}


def test_score_is_the_classs_probability_times_the_masks_mean():
    classes = torch.tensor([[1.0, 2.0, -1.0, 0.5]])
    probabilities = classes[0].softmax(0)
    for o, label in zip(detections(classes, block(2.0)[None], threshold=-1, **SAME), (1, 0, 2), strict=True):
        assert o.label == label and o.box == (3, 2, 9, 5)
        want = probabilities[label].item() / (1 + math.exp(-2)) * 18 / (18 + 1e-6)
        assert math.isclose(o.score, want, rel_tol=1e-6) and torch.equal(o.mask, block(2.0) > 0)


def test_one_query_may_be_several_objects_and_no_object_is_none():
    classes = torch.tensor([[3.0, 3.0, -9.0, 0.0], [-9.0, -9.0, -9.0, 9.0]])
    found = detections(classes, torch.stack([block(1.0), block(5.0)]), threshold=0.1, **SAME)
    assert [o.label for o in found] in ([0, 1], [1, 0])


def test_an_empty_mask_scores_nothing():
    sizes = SAME | {"threshold": 0}
    empty = torch.full((1, 8, 10), -1.0)
    assert detections(torch.tensor([[9.0, 0.0]]), empty, **sizes) == []
    (found,) = detections(torch.tensor([[9.0, 0.0]]), empty, **sizes | {"threshold": -1})
    assert found.score == 0 and found.box == (0, 0, 0, 0)


def test_padding_is_cut_off_before_the_mask_is_brought_to_the_images_size():
    logits = torch.full((1, 8, 10), -5.0)
    logits[:, :, 5:] = 5.0  # only the right half, all of it padding
    assert detections(torch.tensor([[9.0, 0.0]]), logits, padded=(8, 10), valid=(8, 5), size=(16, 10), threshold=0) == []
    (found,) = detections(torch.tensor([[9.0, 0.0]]), logits, padded=(8, 10), valid=(8, 6), size=(16, 12), threshold=0)
    assert found.box[2:] == (12, 16) and found.mask.shape == (16, 12)


def test_how_many_masks_are_enlarged_at_once_changes_nothing(monkeypatch):
    whole = described(from_golden(0.2))
    monkeypatch.setattr(detect, "MASKS", 1)
    assert described(from_golden(0.2)) == whole


# the detector ----------------------------------------------------------------------------------------


@pytest.fixture
def tiny(tmp_path, monkeypatch):
    """The golden weights and a small canvas."""
    monkeypatch.setattr(detect, "LONGEST", 128)
    monkeypatch.setattr(detect, "SHORTEST", 96)
    use_tiny(monkeypatch, tmp_path)


def pictures(*size: int) -> torch.Tensor:
    return torch.rand(*size, generator=torch.Generator().manual_seed(3))


def close(a: list[list[Detection]], b: list[list[Detection]]) -> None:
    """Equal but for the last bits of the scores; order counts where scores differ by more."""
    for one, other in zip(a, b, strict=True):
        assert len(one) == len(other) > 0
        for o, p in zip(*(sorted(found, key=lambda o: (o.label, o.box, round(o.score, 4))) for found in (one, other)), strict=True):
            assert (o.label, o.box) == (p.label, p.box) and abs(o.score - p.score) < 1e-5 and torch.equal(o.mask, p.mask)


def test_masks_and_boxes_are_in_the_images_own_pixels(tiny):
    images = pictures(2, 3, 45, 60)
    found = Detector("cpu")(images, [0.0, 0.0])
    assert len(found) == 2 and all(found)
    for o in (*found[0], *found[1]):
        assert o.mask.shape == (45, 60) and o.mask.dtype == torch.bool and o.mask.device == images.device
        assert 0 <= o.box[0] < o.box[2] <= 60 and 0 <= o.box[1] < o.box[3] <= 45 and 0 < o.score < 1 and 0 <= o.label < 5


def test_each_image_is_judged_alone_and_by_its_own_threshold(tiny):
    images, detector = pictures(5, 3, 45, 60), Detector("cpu")
    together = detector(images, [0.0] * 5)
    close(together, [detector(image[None], [0.0])[0] for image in images])
    close(detector(images.flip(0), [0.0] * 5), together[::-1])
    middle = together[1][len(together[1]) // 2].score
    some = detector(images[:2], [1.0, middle])
    assert some[0] == [] and described(some[1]) == described([o for o in detector(images[:2], [0.0, 0.0])[1] if o.score > middle])


def test_a_callers_autocast_changes_nothing(tiny):
    images, detector = pictures(1, 3, 45, 60), Detector("cpu")
    with torch.autocast("cpu", torch.bfloat16):
        mixed = detector(images, [0.0])
    assert described(mixed[0]) == described(detector(images, [0.0])[0])


def test_upstreams_channel_order_is_the_right_one_of_a_flipped_image(tiny):
    images = pictures(1, 3, 45, 60)
    right, swapped = Detector("cpu"), Detector("cpu", channel_order="upstream_bgr")
    assert right.network is swapped.network
    assert described(swapped(images, [0.0])[0]) == described(right(images.flip(1), [0.0])[0]) != described(right(images, [0.0])[0])


@pytest.mark.parametrize("size", [(1, 1), (1, 300), (300, 1), (7, 33)])
def test_images_of_any_size_pass(tiny, size):
    (found,) = Detector("cpu")(pictures(1, 3, *size), [-1.0])
    assert len(found) == 50 and all(o.mask.shape == size for o in found)


def test_images_without_objects_have_none(tiny):
    assert Detector("cpu")(pictures(2, 3, 8, 8), [1.0, 1.0]) == [[], []]


def test_an_unknown_channel_order_is_refused(tiny):
    with pytest.raises(UserError, match='no channel_order \'bgr\'; it is "rgb" or "upstream_bgr"'):
        Detector("cpu", channel_order="bgr")


def test_missing_weights_are_named(tmp_path, monkeypatch):
    monkeypatch.setenv("FLOWTILT_WEIGHTS", str(tmp_path))
    with pytest.raises(UserError, match=r"mask2former_swin-s.*is missing: `flowtilt download geneval`"):
        Detector("cpu")


def test_a_network_that_says_nothing_finite_is_an_error_not_an_empty_list(tiny, monkeypatch):
    detector = Detector("cpu")
    monkeypatch.setattr(detector.network, "forward", lambda pixels: (torch.full((1, 10, 6), math.nan), torch.zeros(1, 10, 24, 32)))
    with pytest.raises(UserError, match="not finite"):
        detector(pictures(1, 3, 8, 8), [0.3])
