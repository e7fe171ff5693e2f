"""The reward looks where its rules say: objects by the detector, colours of the right pixels, scores row by row."""

import subprocess
import sys
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from flowtilt.errors import UserError
from flowtilt.prompts import Prompt
from flowtilt.prompts.geneval_objects import CLASSES, COLORS
from flowtilt.rewards import load_reward, score
from flowtilt.rewards.geneval import CROPS, GenEval, colors, detect, score_batch

PAINT = {"red": (220, 30, 30), "blue": (40, 60, 230), "green": (30, 200, 60), "black": (10, 10, 10)}


def draw(*objects):
    """An image [3, 96, 128] with rectangles, each (class, colour, box)."""
    image = torch.full((3, 96, 128), 1.0)
    for _, color, (x1, y1, x2, y2) in objects:
        image[:, y1:y2, x1:x2] = torch.tensor(PAINT[color])[:, None, None] / 255
    return image


class Finder:
    """Finds in each image the pixels of each rectangle's paint; the class goes with the paint, in a table."""

    def __init__(self, classes, scores=None):
        self.classes = classes
        self.scores = scores or {}
        self.thresholds = []

    def __call__(self, images, thresholds):
        self.thresholds.append(list(thresholds))
        return [list(self.found(image)) for image in images]

    def found(self, image):
        levels = (image * 255).round()
        for color, name in self.classes.items():
            mask = (levels == torch.tensor(PAINT[color])[:, None, None]).all(0)
            if mask.any():
                rows, columns = mask.any(1).nonzero().flatten(), mask.any(0).nonzero().flatten()
                box = (float(columns[0]), float(rows[0]), float(columns[-1] + 1), float(rows[-1] + 1))
                yield detect.Detection(CLASSES.index(name), self.scores.get(color, 0.95), box, mask)


class Painter:
    """Names the paint that a crop's middle is nearest to; remembers what it was asked."""

    def __init__(self):
        self.asked = []

    def __call__(self, crops, names):
        self.asked.append(list(names))
        assert crops.shape[1:] == (3, 224, 224) and len(crops) == len(names)
        paints = torch.tensor(list(PAINT.values())) / 255
        return [list(PAINT)[int((paints - crop[:, 112, 112]).norm(dim=1).argmin())] for crop in crops]


def asked(text, tag, *include):
    return Prompt(text, tag, {"include": list(include)})


CAR_DOG = asked(
    "a photo of a red car and a blue dog",
    "color_attr",
    {"class": "car", "count": 1, "color": "red"},
    {"class": "dog", "count": 1, "color": "blue"},
)
RIGHT = asked(
    "a photo of a dog right of a car", "position", {"class": "car", "count": 1}, {"class": "dog", "count": 1, "position": ["right of", 0]}
)
THREE = asked("a photo of three dogs", "counting", {"class": "dog", "count": 3})
PLAIN = Prompt("a nice picture")
LEFT_BOX, RIGHT_BOX = (4, 20, 40, 60), (80, 20, 120, 60)
SCENE = draw(("car", "red", LEFT_BOX), ("dog", "blue", RIGHT_BOX))
FINDER = {"red": "car", "blue": "dog"}


def judged(images, prompts, finder=None, painter=None, **options):
    return score_batch(torch.stack(images), prompts, finder or Finder(FINDER), painter or Painter(), **options)


# the whole -------------------------------------------------------------------------------------------


def test_an_image_as_asked_scores_one_and_has_no_note():
    output = judged([SCENE, SCENE], [CAR_DOG, RIGHT])
    assert output.scores.tolist() == [1, 1] and list(output.notes) == ["", ""]
    assert {name: column.tolist() for name, column in output.details.items()} == {"strict": [1, 1], "correct": [1, 1]}


def test_swapped_colours_are_half_right_and_named():
    swapped = Finder({"red": "dog", "blue": "car"})
    output = judged([SCENE], [CAR_DOG], swapped)
    assert output.scores.tolist() == [0.5] and output.details["strict"].tolist() == [0] == output.details["correct"].tolist()
    assert output.notes[0] == "expected red car==1, found 1 blue; expected blue dog==1, found 1 red"


@pytest.mark.parametrize(("compat", "want"), [(False, 2 / 3), (True, 3 / 4)])
def test_compat_reaches_the_rules(compat, want):
    mirrored = SCENE.flip(2)
    assert judged([mirrored], [RIGHT], compat=compat).scores.tolist() == [pytest.approx(want)]


def test_an_extra_object_is_correct_for_the_benchmark_but_not_strictly():
    output = judged(
        [SCENE], [asked("a photo of a dog", "single_object", {"class": "dog", "count": 1})], Finder({"red": "dog", "blue": "dog"})
    )
    assert output.details["strict"].tolist() == [0] and output.details["correct"].tolist() == [1] and output.scores.tolist() == [0]


def test_a_batch_scores_as_its_images_one_by_one_in_any_order():
    images, prompts = [SCENE, SCENE.flip(2), SCENE, SCENE], [CAR_DOG, RIGHT, PLAIN, THREE]
    whole = judged(images, prompts)
    for order in ([3, 2, 1, 0], [1, 0, 3, 2]):
        turned = judged([images[n] for n in order], [prompts[n] for n in order])
        torch.testing.assert_close(turned.scores, whole.scores[order], equal_nan=True, rtol=0, atol=0)
        assert list(turned.notes) == [whole.notes[n] for n in order]
    alone = torch.cat([judged([image], [prompt]).scores for image, prompt in zip(images, prompts, strict=True)])
    torch.testing.assert_close(alone, whole.scores, equal_nan=True, rtol=0, atol=0)


def test_the_detector_is_told_each_tag_s_threshold():
    finder = Finder(FINDER)
    judged([SCENE, SCENE, SCENE], [CAR_DOG, THREE, RIGHT], finder)
    assert finder.thresholds == [[0.3, 0.9, 0.3]]


# what can't be judged --------------------------------------------------------------------------------


def test_a_prompt_without_metadata_has_no_score():
    finder = Finder(FINDER)
    output = judged([SCENE, SCENE], [PLAIN, CAR_DOG], finder)
    assert output.scores.isnan().tolist() == [True, False] == output.details["strict"].isnan().tolist()
    assert output.notes[0] == "no GenEval metadata (tag, include)" and len(finder.thresholds[0]) == 1
    assert judged([SCENE], [PLAIN], finder).scores.isnan().all() and len(finder.thresholds) == 1


def test_an_image_with_a_nan_has_no_score():
    broken = SCENE.clone()
    broken[0, 3, 4] = torch.nan
    reward = lambda images, prompts: score_batch(images, prompts, Finder(FINDER), Painter())  # noqa: E731
    found, notes = score({"geneval": reward}, torch.stack([broken, SCENE]), [CAR_DOG, CAR_DOG])
    assert all(values.isnan().tolist() == [True, False] for values in found.values()) and notes == ["the image is not finite", ""]


@pytest.mark.parametrize(
    "prompt",
    [PLAIN, Prompt("x", "colors"), Prompt("x", "", {"include": [{"class": "dog", "count": 1}]}), Prompt("x", "colors", {"include": []})],
)
def test_it_says_which_prompts_it_can_t_judge(prompt):
    assert GenEval.applies(prompt) == "no GenEval metadata (tag, include)"


def test_it_says_nothing_of_prompts_that_it_can_judge():
    assert [GenEval.applies(prompt) for prompt in (CAR_DOG, RIGHT, THREE)] == ["", "", ""]


def test_faulty_metadata_is_named_with_its_line_or_text():
    faulty = asked("a photo of a pig", "single_object", {"class": "pig", "count": 1})
    with pytest.raises(UserError, match=r'^prompt "a photo of a pig": GenEval metadata: include\[0\]\.class: "pig" is unknown'):
        GenEval.applies(faulty)
    with pytest.raises(UserError, match=r"^prompts mine\.jsonl:7: "):
        judged([SCENE], [replace(faulty, where="mine.jsonl:7")])


# colours ---------------------------------------------------------------------------------------------


def test_colours_are_asked_for_only_where_a_verdict_depends_on_them():
    painter = Painter()
    two = asked("a photo of two red cars", "colors", {"class": "car", "count": 2, "color": "red"})
    judged([SCENE, SCENE, SCENE], [RIGHT, THREE, two], painter=painter)
    assert painter.asked == []
    judged([SCENE], [asked("a photo of a red car", "colors", {"class": "car", "count": 1, "color": "red"})], painter=painter)
    assert painter.asked == [["car"]]


def test_of_too_many_objects_the_best_are_asked_for():
    """The benchmark looks at the best one only; the training rule at none, for the number is wrong."""
    painter = Painter()
    prompt = asked("a photo of a red car", "colors", {"class": "car", "count": 1, "color": "red"})
    output = judged([SCENE], [prompt], Finder({"red": "car", "blue": "car"}, {"red": 0.9, "blue": 0.6}), painter)
    assert painter.asked == [["car"]] and output.details["correct"].tolist() == [1] and output.details["strict"].tolist() == [0]
    output = judged([SCENE], [prompt], Finder({"red": "car", "blue": "car"}, {"red": 0.6, "blue": 0.9}), painter)
    assert output.details["correct"].tolist() == [0]


def test_the_colours_of_a_batch_are_asked_for_together_in_parts_of_bounded_size():
    painter = Painter()
    number = CROPS // 2 + 1
    output = judged([SCENE] * number, [CAR_DOG] * number, painter=painter)
    assert [len(names) for names in painter.asked] == [CROPS, 2] and output.scores.eq(1).all()


def test_an_object_of_no_pixels_has_no_colour():
    def empty(images, thresholds):
        return [[detect.Detection(CLASSES.index("car"), 0.9, (0.0, 0.0, 0.0, 0.0), torch.zeros(96, 128, dtype=torch.bool))]] * len(images)

    output = judged([SCENE], [asked("a photo of a red car", "colors", {"class": "car", "count": 1, "color": "red"})], empty)
    assert output.scores.tolist() == [0.5] and output.notes[0] == "expected red car==1, found no colour"


def test_a_crop_is_the_object_on_grey_and_nothing_else():
    """A box of 224 x 224 is not resized, so every pixel is known: the object's own or level 153."""
    image = torch.rand(3, 300, 260, generator=torch.Generator().manual_seed(0))
    mask = torch.rand(300, 260, generator=torch.Generator().manual_seed(1)) < 0.5
    crop = colors.crop(image, mask, (10, 20, 234, 244))
    inside = mask[20:244, 10:234]
    assert crop is not None and crop.shape == (3, 224, 224)
    levels = (crop * 255).round()
    assert (levels[:, ~inside] == 153).all()
    assert torch.equal(levels[:, inside], (image[:, 20:244, 10:234] * 255).round()[:, inside])


def test_a_crop_s_box_is_rounded_half_to_even():
    image = torch.rand(3, 300, 300, generator=torch.Generator().manual_seed(0))
    mask = torch.ones(300, 300, dtype=torch.bool)
    found, want = colors.crop(image, mask, (10.5, 21.5, 234.5, 245.5)), colors.crop(image, mask, (10, 22, 234, 246))
    assert found is not None and want is not None and torch.equal(found, want)


def test_a_long_crop_keeps_its_middle():
    """40 x 448 pixels become 224 high; the cut of 224 columns shows what is in the middle."""
    image = torch.zeros(3, 40, 448)
    image[0, :, 200:248] = 1
    crop = colors.crop(image, torch.ones(40, 448, dtype=torch.bool), (0, 0, 448, 40))
    assert crop is not None and (crop[0] > 0.99).float().mean() > 0.9


def test_an_odd_margin_s_half_is_rounded_half_to_even():
    """227 columns lose 1.5 at the left, which is 2."""
    image = torch.rand(3, 224, 227, generator=torch.Generator().manual_seed(0))
    crop = colors.crop(image, torch.ones(224, 227, dtype=torch.bool), (0, 0, 227, 224))
    assert crop is not None and torch.equal((crop * 255).round(), (image * 255).round()[:, :, 2:226])


def unit(*values):
    return torch.nn.functional.normalize(torch.tensor(values, dtype=torch.float32), dim=0)


class FakeCLIP:
    """A text has the features that a function gives it, an image those of its first pixel."""

    def __init__(self, features):
        self.features = features
        self.texts = []

    def text_features(self, texts, clean=False):
        assert clean
        self.texts += texts
        return torch.stack([self.features(text) for text in texts])

    def image_features(self, pixels):
        return torch.nn.functional.normalize(pixels[:, :, 0, 0], dim=1)


@pytest.fixture
def classifier(monkeypatch):
    def build(features):
        fake = FakeCLIP(features)
        monkeypatch.setattr(colors.clip, "load", lambda name, device: fake if name == "clip-l" else None)
        return colors.ColorClassifier("cpu"), fake

    return build


def test_the_colour_is_the_one_whose_descriptions_are_nearest(classifier):
    directions = {
        c: torch.nn.functional.normalize(torch.randn(3, generator=torch.Generator().manual_seed(k)), dim=0) for k, c in enumerate(COLORS)
    }
    named, _ = classifier(lambda text: directions[next(c for c in COLORS if f"a {c}" in text)])
    crops = torch.randn(40, 3, generator=torch.Generator().manual_seed(99))
    want = [max(COLORS, key=lambda c: float(directions[c] @ crop)) for crop in crops]
    assert named(crops[:, :, None, None].expand(-1, -1, 224, 224), ["dog", "tv remote"] * 20) == want


def test_a_colour_s_direction_is_the_unit_mean_of_its_descriptions(classifier):
    """Red's descriptions are 60 degrees from their mean, blue's agree. The image is nearer to red's mean; its product with
    the mean itself, half as long, would be smaller than blue's."""
    angles = {"photo of a red dog": 60, "red-colored": -60, "red object": 0, "blue": 90}

    def features(text):
        degrees = next((angle for key, angle in angles.items() if key in text), 180)
        radians = torch.deg2rad(torch.tensor(float(degrees)))
        return torch.stack([radians.cos(), radians.sin(), torch.zeros(())])

    named, _ = classifier(features)
    crop = unit(0.77, 0.64, 0)
    mean = sum(features(text) for text in ("a photo of a red dog", "a photo of a red-colored dog", "a photo of a red object")) / 3
    assert crop @ mean < crop @ features("blue") < crop @ torch.nn.functional.normalize(mean, dim=0)
    assert named(crop[None, :, None, None].expand(1, 3, 224, 224), ["dog"]) == ["red"]


def test_a_class_is_described_once_in_three_sentences_a_colour(classifier):
    named, fake = classifier(lambda text: unit(len(text), 1, 2))
    for _ in range(3):
        named(torch.rand(2, 3, 224, 224), ["wine glass", "wine glass"])
    assert len(fake.texts) == 30
    assert fake.texts[:3] == ["a photo of a red wine glass", "a photo of a red-colored wine glass", "a photo of a red object"]
    assert fake.texts[-1] == "a photo of a white object"


# the class -------------------------------------------------------------------------------------------


@pytest.fixture
def parts(monkeypatch):
    """A detector and a classifier that need no weights; records how they were built."""
    built = SimpleNamespace(orders=[])

    def detector(device, *, channel_order):
        built.orders.append(channel_order)
        return Finder(FINDER)

    monkeypatch.setattr(detect, "Detector", detector)
    monkeypatch.setattr(colors, "ColorClassifier", lambda device: Painter())
    return built


def test_compat_swaps_red_and_blue_for_the_detector_alone(parts):
    load_reward("geneval", "geneval")
    reward = load_reward("geneval", "geneval", options={"compat": True})
    assert parts.orders == ["rgb", "upstream_bgr"]
    assert getattr(reward, "compat", None) is True
    output = score({"geneval": reward}, torch.stack([SCENE, SCENE.flip(2)]), [CAR_DOG, RIGHT])[0]
    assert output["geneval"].tolist() == [1, 0.75]


def test_strict_and_correct_are_columns_beside_the_score(parts):
    columns, notes = score({"geneval": load_reward("geneval", "geneval")}, torch.stack([SCENE, SCENE.flip(2)]), [CAR_DOG, RIGHT])
    assert list(columns) == ["geneval", "geneval/strict", "geneval/correct"]
    assert columns["geneval/strict"].tolist() == [1, 0] and notes[0] == "" and "dog right of car" in notes[1]


def test_an_unknown_option_is_refused():
    with pytest.raises(UserError, match="compat"):
        load_reward("geneval", "geneval", options={"compatible": True})


def test_without_weights_it_says_what_to_fetch(monkeypatch, tmp_path):
    monkeypatch.setenv("FLOWTILT_WEIGHTS", str(tmp_path))
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(UserError, match="flowtilt download geneval"):
        GenEval(device="cpu")


def test_the_rules_are_imported_without_any_network():
    check = "import sys; from flowtilt.rewards.geneval import judge, GenEval; sys.exit('transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", check], check=False).returncode == 0
