"""The text rule on worked cases, then what the engine really reads in pictures drawn here."""

import json
import math
import string
import sys
from functools import cache
from itertools import product
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, ImageDraw, ImageFont

from flowtilt.errors import UserError
from flowtilt.io.images import from_pil
from flowtilt.prompts import Prompt
from flowtilt.rewards import RewardOutput, load_reward, ocr, score
from flowtilt.rewards.ocr import OCR, levenshtein, plain, target, text_score
from flowtilt.rewards.reading_order import reading_order

GOLDEN = [
    case
    for case in json.loads((Path(__file__).parent / "golden" / "ocr_cases.json").read_text())["cases"]
    if case["name"] != "engine error"
]
REPAIRED = {"curly quotes": 1.0, "one quote only": math.nan, "empty quotes": math.nan}
"""Where flow_grpo raises, or takes the rest of the prompt for the target, and what is right."""

# the rule --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", GOLDEN, ids=lambda case: case["name"])
def test_the_rule_agrees_with_flow_grpo_where_that_is_right(case):
    got = text_score("".join(case["recognised"]), case["prompt"])
    assert got == pytest.approx(REPAIRED.get(case["name"], case["reward"]), abs=1e-12, nan_ok=True)


@pytest.mark.parametrize("case", GOLDEN, ids=lambda case: case["name"])
def test_compat_gives_flow_grpos_number_and_nan_where_it_raises(case):
    upstream = case["reward"] if isinstance(case["reward"], float) else math.nan
    assert text_score("".join(case["recognised"]), case["prompt"], compat=True) == pytest.approx(upstream, abs=1e-12, nan_ok=True)


@cache
def by_definition(a: str, b: str) -> int:
    if not a or not b:
        return len(a) + len(b)
    return min(by_definition(a[1:], b) + 1, by_definition(a, b[1:]) + 1, by_definition(a[1:], b[1:]) + (a[0] != b[0]))


def test_the_distance_is_levenshteins_on_all_short_strings():
    words = ["".join(letters) for length in range(5) for letters in product("ab", repeat=length)]
    assert all(levenshtein(a, b) == by_definition(a, b) for a, b in product(words, words))


@given(st.text("abc"), st.text("abc"), st.text("abc"))
def test_the_distance_is_a_metric(a, b, c):
    assert levenshtein(a, b) == levenshtein(b, a) and (levenshtein(a, b) == 0) == (a == b)
    assert levenshtein(a, c) <= levenshtein(a, b) + levenshtein(b, c)


@given(st.text(max_size=30), st.text(st.characters(exclude_characters='"\\'), max_size=12))
def test_the_score_is_a_share_or_missing(read, wanted):
    found = text_score(read, f'a sign "{wanted}"')
    assert math.isnan(found) if not plain(wanted) else 0 <= found <= 1


# a backslash before a quote escapes it, as in a prompt that was never unescaped
@given(st.text(st.characters(exclude_characters='"\\'), min_size=1, max_size=12))
def test_what_is_written_as_asked_scores_1_whatever_stands_around_it(wanted):
    if plain(wanted):
        assert text_score(f"| {wanted} |", f'a sign "{wanted}"') == 1


@pytest.mark.parametrize("read", ["hello world", "HELLO WORLD", "He\tllo\nWor\u00a0ld", "Ｈｅｌｌｏ　Ｗｏｒｌｄ", "Hel\u200blo World"])
def test_case_white_space_and_width_do_not_count(read):
    assert text_score(read, 'sign "Hello World"') == 1


@pytest.mark.parametrize(
    ("read", "wanted"),
    [
        ("You're Late", "You’re Late"),
        ("E=mc²", "E=mc²"),
        ("E=mc2", "E=mc²"),
        ("O₂ LOW", "O₂ LOW"),
        ("13½ Floor", "13½ Floor"),
        ("a-b", "a—b"),
    ],
)
def test_forms_that_the_engine_writes_for_one_another_count_as_equal(read, wanted):
    """Each is what the engine read in a picture that shows `wanted` as it is, or could have."""
    assert text_score(read, f'sign "{wanted}"') == 1


def test_a_decomposed_accent_is_the_composed_one():
    assert text_score("naïve", 'sign "nai\u0308ve"') == 1 and text_score("naïve", 'sign "nai\u0308ve"', compat=True) < 1


@pytest.mark.parametrize(
    ("prompt", "wanted"),
    [
        ('a "One" and "Two"', "One"),
        ("ein Schild „Guten Tag“", "Guten Tag"),
        ("a sign “Open”", "Open"),
        ("a sign ”Open”", "Open"),
        ('“not this” but "this"', "this"),
        ('"line\nbreak"', "line\nbreak"),
        ('"It\'s"', "It's"),
        ('a 6" pipe', None),
        ("a 'single' quote", None),
        ('"  "', None),
        ('"\u200b"', None),
        ("no text", None),
        ("", None),
    ],
)
def test_the_target_is_the_first_text_in_double_quotes(prompt, wanted):
    assert target(prompt) == wanted
    assert math.isnan(text_score("anything", prompt)) == (wanted is None)
    assert bool(OCR.applies(Prompt(prompt))) == (wanted is None)


PUBLISHED = [
    (
        'A realistic photograph of a modern highway scene with a billboard displaying the text "Gas Next Exit 2 Miles" against a sky.',
        "Gas Next Exit 2 Miles",
    ),
    ('A mountain summit with a wooden signpost clearly marked "Elevation 8000 Feet", surrounded by rocky terrain.', "Elevation 8000 Feet"),
    ('A runway with a sleek, modern backdrop displaying "Spring Collection 2024". Models walk confidently.', "Spring Collection 2024"),
]


@pytest.mark.parametrize(("prompt", "wanted"), PUBLISHED)
def test_prompts_as_published_have_the_target_that_flow_grpo_takes(prompt, wanted):
    assert target(prompt) == wanted == prompt.split('"')[1]


@given(st.text(st.sampled_from("ab5 .,'-")), st.text(st.sampled_from("ab5 .,'-")), st.text(st.sampled_from("ab5 .,'-")))
def test_two_quotes_that_are_no_inches_enclose_the_target_whatever_stands_beside_them(before, wanted, after):
    prompt = f'{before}"{wanted}"{after}'
    if plain(wanted) and not before.rstrip().endswith("5"):
        assert target(prompt) == wanted


@pytest.mark.parametrize(
    ("prompt", "wanted"),
    [
        ('a 5" nail beside a sign "HELLO"', "HELLO"),
        ('a sign "HELLO" beside a 5" nail', "HELLO"),
        ('a 24" x 36" poster that says "SALE"', "SALE"),
        ('a 12"x18" poster that says "SALE"', "SALE"),
        ('a man of 5\'10" with a sign "VOTE"', "VOTE"),
        ('a 3½" disk labelled "BACKUP 1"', "BACKUP 1"),
        ('a 5 " nail beside "HELLO"', "HELLO"),
        ("a 5” nail beside a sign “HELLO”", "HELLO"),
        ('a 27" screen with "READY" beside a 13" screen with "GO"', "READY"),
        ('a sign "12" PIZZA"', '12" PIZZA'),
        ('a sign "NASA 2049" above', "NASA 2049"),
        ('a 5" by 7" card', None),
        (r"a sign \"HELLO\" above", "HELLO"),
        (r"a sign \\\"HELLO\\\" above", "HELLO"),
        ('a sign ""HELLO"" above', "HELLO"),
        ("a sign &quot;HELLO&quot; above", "HELLO"),
        ('a sign “HELLO" above', "HELLO"),
        ("une enseigne « OUVERT »", " OUVERT "),
        ("the baker's sign \"Joe's\"", "Joe's"),
        ('"" and "Two"', "Two"),
    ],
)
def test_inches_and_escapes_are_no_quotes_of_the_target(prompt, wanted):
    assert target(prompt) == wanted


# reading order ---------------------------------------------------------------------------------------


def box(x, y, width, height=40.0, degrees=0.0):
    """Corners of a box of the text's own coordinates, turned about the picture's middle."""
    corners = [(x, y), (x + width, y), (x + width, y + height), (x, y + height)]
    turn = math.radians(degrees)
    return [
        (256 + (a - 256) * math.cos(turn) - (b - 256) * math.sin(turn), 256 + (a - 256) * math.sin(turn) + (b - 256) * math.cos(turn))
        for a, b in corners
    ]


PAGE = [(30, 100, 150), (220, 100, 60), (330, 100, 150), (30, 150, 100), (150, 150, 300), (60, 200, 380)]


@pytest.mark.parametrize("degrees", [-35, -20, -8, 0, 8, 20, 35])
@given(order=st.permutations(range(len(PAGE))))
def test_lines_are_read_one_by_one_whatever_their_slope(degrees, order):
    found = reading_order([box(*PAGE[k], degrees=degrees) for k in order])
    assert [order[k] for k in found] == list(range(len(PAGE)))


@pytest.mark.parametrize("rise", [-30, -10, 10, 30])
def test_words_beside_one_another_are_read_from_the_left_though_not_level(rise):
    words = [box(20 + 160 * k, 250 - rise * k, 120) for k in range(3)]
    assert reading_order(words) == [0, 1, 2] and reading_order(words[::-1]) == [2, 1, 0]


def test_words_above_one_another_are_read_from_the_top():
    assert reading_order([box(100, 245, 200), box(140, 200, 120)]) == [1, 0]
    assert reading_order([]) == []


def test_words_on_a_slope_are_read_in_their_order(reader):
    picture = Image.new("RGB", (512, 512), "white")
    letters = ImageFont.load_default(40)
    for x, y, word in ((30, 220, "HELLO"), (290, 190, "WORLD")):
        ImageDraw.Draw(picture).text((x, y), word, font=letters, fill="black")
    turned = picture.rotate(10, fillcolor="white", resample=Image.Resampling.BICUBIC)
    images = torch.stack([from_pil(picture), from_pil(turned)])
    assert output(reader, images, [Prompt('"Hello World"')] * 2).scores.tolist() == [1, 1]


# what the engine can know ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text", ["Hello", "naïve café", "Größe ẞ", "Łódź", "ğüşİıöç", "¿Qué? ¡Hola!", "100€", "13½", "你好", "こんにちは", "I ❤ NY"]
)
def test_targets_of_known_letters_apply(text):
    assert OCR.applies(Prompt(f'a sign "{text}"')) == ""


@pytest.mark.parametrize("text", ["Привет", "Hello Привет", "안녕", "مرحبا", "שלום", "TIẾNG VIỆT", "Ελλάδα", "🦄"])
def test_targets_that_cannot_be_read_do_not_apply_and_the_reason_names_the_letters(text):
    pytest.importorskip("onnxruntime")
    reason = OCR.applies(Prompt(f'a sign "{text}"'))
    unknown = reason.split('"')[1]
    assert set(unknown) <= set(plain(text)) and not set(unknown) & ocr.readable() and text in reason


def test_the_engine_knows_every_ascii_sign():
    pytest.importorskip("onnxruntime")
    assert set(plain(string.printable)) <= ocr.readable()


def test_without_the_extra_only_the_target_is_asked_for(monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    monkeypatch.setattr(ocr, "readable", ocr.readable.__wrapped__)
    assert OCR.applies(Prompt('"Привет"')) == "" and OCR.applies(Prompt("Привет")) == ocr.NO_TARGET


@pytest.mark.parametrize("package", ["rapidocr", "onnxruntime"])
def test_without_the_extra_the_error_says_what_to_install(monkeypatch, package):
    pytest.importorskip("onnxruntime")
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(UserError, match=r"pip install rapidocr onnxruntime"):
        OCR(device="cpu")


def test_a_release_without_these_models_is_an_error_not_a_download(monkeypatch, tmp_path):
    pytest.importorskip("rapidocr")
    monkeypatch.setattr(ocr, "_models", lambda: tmp_path)
    with pytest.raises(UserError, match=r"PP-OCRv6_det_small\.onnx is missing"):
        OCR(device="cpu")


@pytest.mark.parametrize("side", [0, 31, 736.0, True, "736"])
def test_a_side_that_is_no_size_is_refused(side):
    pytest.importorskip("rapidocr")
    with pytest.raises(UserError, match="side"):
        OCR(device="cpu", side=side)


# the engine ------------------------------------------------------------------------------------------

COLOURS = [("black", "white"), ("white", "navy"), ("gold", "darkred"), ("#203020", "#d8e8c8")]
TEXTS = [
    "Hello World",
    "OPEN 24 HOURS",
    "NASA 2049",
    "It's Tea Time!",
    "50% OFF",
    "Room 13½",
    "Déjà vu",
    "Grand\nOpening",
    "No Parking",
    "Wake up & smile",
]


@pytest.fixture(scope="module")
def reader():
    pytest.importorskip("rapidocr")
    return OCR(device="cpu", side=512)


def draw(text: str, size: int = 40, font: str | None = None, colours=("black", "white")) -> torch.Tensor:
    picture = Image.new("RGB", (512, 512), colours[1])
    try:
        letters = ImageFont.truetype(font, size) if font else ImageFont.load_default(size)
    except OSError:  # a machine without this font
        letters = ImageFont.load_default(size)
    ImageDraw.Draw(picture).multiline_text((256, 256), text, font=letters, fill=colours[0], anchor="mm", align="center")
    return from_pil(picture)


def batch(texts: list[str], **how) -> tuple[torch.Tensor, list[Prompt]]:
    return torch.stack([draw(text, **how) for text in texts]), [Prompt(f'a sign that says "{" ".join(text.split())}"') for text in texts]


def output(reward, images, prompts) -> RewardOutput:
    found = reward(images, prompts)
    assert isinstance(found, RewardOutput) and found.scores.shape == (len(prompts),) == (len(found.notes),)
    assert found.scores.dtype == torch.float32
    return found


@pytest.mark.parametrize("side", [512, 736])
def test_text_that_is_drawn_is_read(side):
    pytest.importorskip("rapidocr")
    fonts = [None, "DejaVuSans.ttf", "DejaVuSerif-Bold.ttf", "DejaVuSansMono.ttf"]
    looks = [dict(size=(18, 28, 40, 56)[k % 4], font=fonts[k * 3 % 4], colours=COLOURS[k % 3]) for k in range(len(TEXTS))]
    images = torch.stack([draw(text, **look) for text, look in zip(TEXTS, looks, strict=True)])
    found = output(OCR(device="cpu", side=side), images, batch(TEXTS)[1])
    assert found.scores.mean() >= 0.95
    assert all((note == "") == (value == 1) for note, value in zip(found.notes, found.scores, strict=True))


def test_other_text_scores_less_and_the_note_says_what_was_read(reader):
    images, _ = batch(["NASA 2048", "Hotel"])
    found = output(reader, images, [Prompt('"NASA 2049"'), Prompt('"NASA 2049"')])
    assert found.scores.tolist() == pytest.approx([7 / 8, 0]) and found.notes[0] == 'read "NASA 2048", wanted "NASA 2049"'


def test_nothing_written_is_a_score_of_0(reader):
    pictures = [torch.ones(1, 3, 512, 512), torch.zeros(1, 3, 512, 512), torch.full((1, 3, 1, 1), 0.5), torch.zeros(1, 3, 8, 8)]
    for picture in pictures:
        found = output(reader, picture, [Prompt('"Hi"')])
        assert found.scores.tolist() == [0] and found.notes == ['read nothing, wanted "Hi"']


def test_no_image_gives_no_score(reader):
    assert output(reader, torch.zeros(0, 3, 64, 64), []).scores.tolist() == []


def test_a_score_does_not_depend_on_the_batch_its_order_or_the_number_of_threads(reader, monkeypatch):
    images, prompts = batch(TEXTS[:5], size=26, font="DejaVuSerif-Bold.ttf", colours=COLOURS[3])
    prompts[0] = Prompt('"Yellow Wood"')
    monkeypatch.setattr(ocr, "cores", lambda: 3)
    together = output(OCR(device="cpu", side=512), images.flip(0), prompts[::-1])
    monkeypatch.setattr(ocr, "cores", lambda: 1)
    lonely = OCR(device="cpu", side=512)
    alone = [output(lonely, images[k : k + 1], prompts[k : k + 1]) for k in range(5)]
    assert torch.equal(together.scores.flip(0), torch.cat([found.scores for found in alone]))
    assert list(together.notes)[::-1] == [found.notes[0] for found in alone] and alone[0].scores < 1


def test_a_prompt_without_a_target_is_missing_and_its_image_is_not_read(reader, monkeypatch):
    monkeypatch.setattr(OCR, "_read", lambda *_: pytest.fail("read"))
    found = output(reader, torch.ones(3, 3, 64, 64), [Prompt("a cat"), Prompt('a 6" pipe'), Prompt('"Привет"')])
    assert found.scores.isnan().all() and found.notes[0] == ocr.NO_TARGET and "привет" in found.notes[2]


@pytest.mark.parametrize("compat", [False, True])
def test_an_error_of_the_engine_is_raised_and_never_a_score(monkeypatch, compat):
    pytest.importorskip("rapidocr")
    reward = OCR(device="cpu", compat=compat)

    def broken(*_):
        raise RuntimeError("no memory")

    monkeypatch.setattr(OCR, "_read", broken)
    with pytest.raises(UserError, match="reward ocr failed: RuntimeError: no memory"):
        score({"ocr": reward}, torch.ones(2, 3, 64, 64), [Prompt('"Hi"')] * 2)


def test_compat_reads_the_same_and_judges_as_flow_grpo(reader):
    reward = load_reward("ocr", "ocr", options={"side": 512, "compat": True})
    images, _ = batch(["You’re Late"])
    prompts = [Prompt('a sign "You’re Late')]  # one quote: the rest is the target
    found = output(reward, images, prompts)
    assert found.scores.tolist() == pytest.approx([9 / 10]) and found.notes[0].endswith('wanted "You’re Late"')
    assert output(reader, images, prompts).scores.isnan().all()
    assert output(reward, images, [Prompt("a sign “Late”")]).scores.isnan().all()


@pytest.mark.parametrize("size", [(2000, 1), (1, 2000)])
def test_a_strip_of_a_pixels_width_is_read_in_a_moment(size):
    """It stands on black: else the detector would make it hundreds of thousands of pixels long."""
    from flowtilt.rewards.ocr import _not_too_oblong

    assert max(_not_too_oblong(Image.new("RGB", size)).size) <= 8 * min(_not_too_oblong(Image.new("RGB", size)).size)
    picture = Image.new("RGB", (800, 100), "red")
    assert _not_too_oblong(picture) is picture
