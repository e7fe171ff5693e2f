"""Pair files: what is read, what is dropped, and the one line about what can't be."""

import json
import re
from io import BytesIO

import pytest
import torch
from PIL import Image

from flowtilt import UserError
from flowtilt.models.encoding import encode_images
from flowtilt.preferences import Picture, read_preferences
from flowtilt.training.dpo.latents import Latents


def picture(path, colour="red", size=(4, 4)):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, colour).save(path)
    return path


@pytest.fixture
def folder(tmp_path):
    for name in "abc":
        picture(tmp_path / "images" / f"{name}.png")
    return tmp_path


def lines(folder, *records):
    path = folder / "mine.jsonl"
    path.write_text("\n".join(one if isinstance(one, str) else json.dumps(one) for one in records) + "\n")
    return path


GOOD = {"prompt": "a red circle", "chosen": "images/a.png", "rejected": "images/b.png"}


def test_a_line_is_a_pair_with_paths_beside_the_file(folder):
    found = read_preferences(lines(folder, GOOD, "", GOOD | {"prompt": "  two\u200b dogs ", "weight": 2, "confidence": None}))
    first, second = found.pairs
    assert first.prompt == "a red circle" and first.weight == 1 and not found.dropped
    assert (first.chosen, first.rejected) == (Picture(folder / "images" / "a.png"), Picture(folder / "images" / "b.png"))
    assert (second.prompt, second.weight) == ("two dogs", 2.0) and second.where.endswith("mine.jsonl:3")


def test_hpdv3s_list_prefers_its_first_path(folder):
    (folder / "train.json").write_text(json.dumps([{"prompt": "x", "path1": "images/c.png", "path2": "images/a.png", "model1": "m"}]))
    (pair,) = read_preferences(folder / "train.json").pairs
    assert pair.chosen.file.name == "c.png" and pair.rejected.file.name == "a.png" and pair.where.endswith("train.json, entry 1")


def test_one_image_against_itself_is_a_tie_that_is_counted(folder):
    found = read_preferences(lines(folder, GOOD, GOOD | {"rejected": "images/a.png"}, GOOD | {"rejected": "images/a.png"}))
    assert len(found.pairs) == 1 and found.dropped == {"tied": 2} and str(found) == "1 pair; 2 rows left out: 2 tied"


WRONG = [
    (["{torn"], r"mine\.jsonl:1: not JSON \(.*\); write one object per line$"),
    ([GOOD, [1]], r'mine\.jsonl:2: not an object; write \{"prompt"'),
    ([GOOD | {"prompt": 3}], r'mine\.jsonl:1: "prompt" must be a text, not 3$'),
    ([GOOD | {"prompt": "  "}], r"mine\.jsonl:1: \"prompt\" must be a text"),
    ([{"chosen": "images/a.png", "rejected": "images/b.png"}], r'mine\.jsonl:1: "prompt" must be a text, not nothing'),
    (['{"prompt": "\\ud83d", "chosen": "images/a.png", "rejected": "images/b.png"}'], "half of a surrogate pair"),
    ([GOOD, {"prompt": "x", "chosen": "images/a.png"}], r'mine\.jsonl:2: no "rejected"; a pair has'),
    ([{"prompt": "x", "path2": "images/a.png"}], r'mine\.jsonl:1: no "path1"'),
    ([GOOD | {"chosen": ["images/a.png"]}], r'"chosen" must be the path of an image, not \['),
    ([GOOD | {"rejected": "images/nowhere.png"}], r'mine\.jsonl:1: no image images/nowhere\.png \("rejected"\); paths are relative to '),
    ([GOOD | {"rejected": "images"}], r"no image images "),
    ([GOOD | {"rejected": "images/\0.png"}], r"no image images/"),
    (
        ['{"prompt": "x", "chosen": "images/a.png", "rejected": "images/b.png", "weight": NaN}'],
        r'"weight" must be a number above 0.*not nan',
    ),
    ([GOOD | {"weight": 0}], r'"weight" must be a number above 0'),
    ([GOOD | {"weight": True}], r'"weight" must be a number above 0.*not True'),
    ([GOOD | {"weight": "1"}], r'"weight" must be a number above 0'),
    (['{"prompt": "x", "chosen": "images/a.png", "rejected": "images/b.png", "weight": 1' + "0" * 400 + "}"], '"weight" must be'),
    ([], r"mine\.jsonl: no pair in the file; write one object per line$"),
    ([GOOD | {"rejected": "images/a.png"}], r"no pair in the file \(0 pairs; 1 row left out: 1 tied\)"),
]


@pytest.mark.parametrize(("records", "said"), WRONG)
def test_what_is_no_pair_is_one_line_with_file_and_row(folder, records, said):
    with pytest.raises(UserError, match=said) as caught:
        read_preferences(lines(folder, *records))
    assert "\n" not in str(caught.value) and str(caught.value).startswith("pairs ")


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("no.jsonl", None, "No such file"),
        ("x.csv", b"prompt", "unknown kind of file"),
        ("x.json", b"{}", "not a JSON list"),
        ("x.json", b"[1,\n2", "not JSON in line 2"),
        ("x.jsonl", b"PAR1\0\0", "a Parquet file"),
        ("x.jsonl", b"[" * 100_000, "can't be read"),
        ("empty", None, "No such file|unknown kind"),
    ],
)
def test_a_file_that_holds_no_pairs_says_what_it_is(tmp_path, name, content, said):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=said):
        read_preferences(tmp_path / name)
    with pytest.raises(UserError, match=r"neither pairs\.jsonl nor a \.parquet file"):
        read_preferences(picture(tmp_path / "only images" / "a.png").parent)


# Pick-a-Pic ------------------------------------------------------------------------------------------


def png(colour):
    buffer = BytesIO()
    Image.new("RGB", (6, 4), colour).save(buffer, "PNG")
    return buffer.getvalue()


def parquet(path, **changed):
    pq, pa = pytest.importorskip("pyarrow.parquet"), pytest.importorskip("pyarrow")
    columns = {
        "caption": ["a", "b", "c", "d", "e"],
        "jpg_0": [png("red")] * 5,
        "jpg_1": [png("blue")] * 5,
        "label_0": [1.0, 0.0, 0.5, 0.0, 1.0],
        "label_1": [0.0, 1.0, 0.5, 1.0, 0.0],
        "has_label": [True, True, True, False, True],
        "are_different": [True, True, True, True, False],
    } | changed
    pq.write_table(pa.table({name: value for name, value in columns.items() if value is not None}), path, row_group_size=2)
    return path


def test_pick_a_pics_labels_choose_and_ties_are_dropped(tmp_path):
    found = read_preferences(parquet(tmp_path / "p.parquet"))
    assert [(pair.prompt, pair.chosen.column, pair.rejected.column) for pair in found.pairs] == [
        ("a", "jpg_0", "jpg_1"),
        ("b", "jpg_1", "jpg_0"),
    ]
    assert found.dropped == {"tied": 1, "without a label": 1, "of equal images": 1}
    assert found.pairs[1].where.endswith("p.parquet, row 2")
    parquet(tmp_path / "q.parquet", has_label=None, are_different=None)  # v1 has neither
    assert len(read_preferences(tmp_path).pairs) == 2 + 4


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"label_0": [1.0, 0.7, 0.5, 0.0, 1.0]}, r"p\.parquet, row 2: label_0 and label_1 must be 1 and 0"),
        ({"label_1": [None] * 5}, r"row 1: label_0 and label_1 must be"),
        ({"caption": ["a", None, "c", "d", "e"]}, r'row 2: "prompt" must be a text, not nothing'),
        ({"jpg_1": None}, r"p\.parquet: no column jpg_1"),
    ],
)
def test_a_row_that_is_no_preference_is_named(tmp_path, changed, said):
    with pytest.raises(UserError, match=said):
        read_preferences(parquet(tmp_path / "p.parquet", **changed))


def test_without_pyarrow_a_parquet_file_says_what_to_install(tmp_path, monkeypatch):
    import sys

    (tmp_path / "p.parquet").write_bytes(b"PAR1")
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    with pytest.raises(UserError, match=r"pip install flowtilt\[pairs\]"):
        read_preferences(tmp_path / "p.parquet")


def test_a_torn_parquet_file_is_refused(tmp_path):
    pytest.importorskip("pyarrow")
    (tmp_path / "p.parquet").write_bytes(b"PAR1 and then nothing")
    with pytest.raises(UserError, match=r"p\.parquet: can't be read as a Parquet file"):
        read_preferences(tmp_path / "p.parquet")


# latents ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def model():
    from flowtilt.config import ModelSettings
    from flowtilt.models.opening import open_model

    return open_model(ModelSettings(path="playground"), torch.device("cpu"))


@pytest.fixture(scope="module")
def drawn():
    """Pictures of the playground's world, [4, 3, 32, 32]."""
    from flowtilt.playground import world
    from flowtilt.seeding import generator

    return world.render([world.arrange(prompt, generator(0, "test", k)) for k, prompt in enumerate(world.prompts("train")[:4])])


def test_latents_decode_to_the_picture_and_have_the_networks_scale(model, drawn):
    latents = encode_images(model, drawn)
    assert latents.shape == (4, *model.latent_shape) and latents.dtype == torch.float32
    assert float((model.decode(latents) - drawn).abs().mean()) < 0.02
    assert 0.3 < float(latents.std()) < 3
    torch.testing.assert_close(encode_images(model, drawn), latents, rtol=0, atol=0)  # nothing is drawn
    torch.testing.assert_close(encode_images(model, model.decode(latents)), latents, rtol=0.3, atol=0.6)


def test_a_family_with_latents_of_its_own_encodes_them_itself(model, drawn):
    class Other:
        latent_shape = (1, 32, 32)

        def encode_images(self, images):
            return images[:, :1]

    assert torch.equal(encode_images(Other(), drawn), drawn[:, :1])
    Other.latent_shape = (3, 32, 32)
    with pytest.raises(UserError, match=r"makes latents \[1, 32, 32\] .* the network reads \[3, 32, 32\]"):
        encode_images(Other(), drawn)


def test_pictures_are_cut_to_the_models_square_upright(model, drawn, tmp_path):
    from flowtilt.io.images import ORIENTATION, to_pil

    plain, wide = to_pil(drawn[:1])[0], Image.new("RGB", (96, 32), "white")
    wide.paste(plain, (32, 0))
    turned, exif = plain.rotate(90, expand=True), Image.Exif()
    exif[ORIENTATION] = 6  # a viewer turns it by 90 degrees clockwise
    for name, one in (("plain", plain), ("wide", wide)):
        one.save(tmp_path / f"{name}.png")
    turned.save(tmp_path / "turned.png", exif=exif)
    latents = Latents(model)
    found = [latents(Picture(tmp_path / f"{name}.png"), "x:1") for name in ("plain", "wide", "turned")]
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])


def test_memory_is_bounded_and_what_was_given_up_is_the_same_again(model, tmp_path, folder):
    one = Picture(picture(tmp_path / "1.png", "red", (40, 40)))
    two = Picture(picture(tmp_path / "2.png", "blue", (64, 33)))
    tight = Latents(model, size=1)
    first = tight(one, "x:1")
    assert not torch.equal(tight(two, "x:1"), first) and len(tight._kept) == 1
    assert torch.equal(tight(one, "x:1"), first)
    assert tight.stack([]).shape == (0, *model.latent_shape)


def test_a_picture_that_is_no_image_names_the_pairs_row(model, tmp_path):
    (tmp_path / "bad.png").write_bytes(b"not an image")
    with pytest.raises(UserError, match=r"^pairs p\.jsonl:7: .*bad\.png: not an image"):
        Latents(model)(Picture(tmp_path / "bad.png"), "p.jsonl:7")


def test_a_cell_of_a_parquet_file_is_its_picture(model, tmp_path):
    path = parquet(tmp_path / "p.parquet", jpg_0=[png("red"), png("green"), png("red"), png("blue"), b"torn"])
    latents = Latents(model)
    cells = [latents(Picture(path, row, "jpg_0"), "p, row") for row in range(4)]
    alone = [latents(Picture(picture(tmp_path / f"{c}.png", c, (6, 4))), "p") for c in ("red", "green", "red", "blue")]
    assert all(torch.equal(a, b) for a, b in zip(cells, alone, strict=True))
    with pytest.raises(UserError, match=re.escape("pairs p, row 4: ")):
        latents(Picture(path, 4, "jpg_0"), "p, row 4")
