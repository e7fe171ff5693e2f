"""`flowtilt score`: which image belongs to which prompt, and images that can't be read."""

import csv
import json

import pytest
import torch
from commands import typed
from PIL import Image

from flowtilt import UserError
from flowtilt.cli import main
from flowtilt.evaluate.images import score_images
from flowtilt.evaluate.pairs import find_pairs
from flowtilt.pictures import to_png
from flowtilt.prompts import Prompt
from flowtilt.rewards.playground import PlaygroundPartial


def brightness(images, prompts):
    return images.mean((1, 2, 3))


def grey(path, value, size=(8, 8)):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("L", size, value).save(path)


def test_images_are_taken_in_the_order_of_their_numbers(tmp_path):
    for k in (1, 2, 10, 9):
        grey(tmp_path / f"image_{k}.png", k)
    pairs = find_pairs([tmp_path], [Prompt(str(k)) for k in (1, 2, 9, 10)])
    assert [(p.file.stem, p.prompt.text) for p in pairs] == [("image_1", "1"), ("image_2", "2"), ("image_9", "9"), ("image_10", "10")]


def test_several_images_of_a_prompt_are_one_cluster(tmp_path):
    for k in range(6):
        grey(tmp_path / f"{k}.png", k)
    pairs = find_pairs([tmp_path], [Prompt("a"), Prompt("b")], images_per_prompt=3)
    assert [(p.index, p.copy) for p in pairs] == [(0, 0), (0, 1), (0, 2), (1, 0), (1, 1), (1, 2)]


def test_genevals_own_layout_brings_its_prompts(tmp_path):
    for index, text in ((0, "a photo of a dog"), (1, "a photo of a cat")):
        for copy in range(2):
            grey(tmp_path / f"{index:05d}" / "samples" / f"{copy:04d}.png", 10 * index + copy)
        metadata = {"tag": "single_object", "include": [{"class": text.split()[-1], "count": 1}], "prompt": text}
        (tmp_path / f"{index:05d}" / "metadata.jsonl").write_text(json.dumps(metadata))
        grey(tmp_path / f"{index:05d}" / "grid.png", 99)  # beside samples, no sample
    pairs = find_pairs([tmp_path], None)
    assert [(p.prompt.text, p.copy) for p in pairs] == [(f"a photo of a {name}", copy) for name in ("dog", "cat") for copy in (0, 1)]
    assert pairs[3].prompt.metadata["include"][0]["class"] == "cat"


def geneval_folders(folder, *names):
    for name in names:
        grey(folder / name / "samples" / "0000.png", 9)
        (folder / name / "metadata.jsonl").write_text(json.dumps({"tag": "colors", "include": [], "prompt": name}))


def test_a_folder_of_genevals_without_its_prompt_or_its_images_is_not_passed_over(tmp_path):
    geneval_folders(tmp_path, "00000", "00001", "00010")
    (tmp_path / "notes").mkdir()  # no samples: none of the benchmark's
    assert len(find_pairs([tmp_path], None)) == 3
    for name in ("00001", "00010"):
        (tmp_path / name / "metadata.jsonl").unlink()
    with pytest.raises(UserError, match=r"2 of 3 folders in GenEval's layout lack metadata\.jsonl, .*00001 first"):
        find_pairs([tmp_path], None)
    geneval_folders(tmp_path, "00001", "00010")
    (tmp_path / "00010" / "samples" / "0000.png").unlink()
    with pytest.raises(UserError, match=r"1 of 3 folders in GenEval's layout lack images in samples/, .*00010 first"):
        find_pairs([tmp_path], None)


def test_what_evaluate_kept_can_be_judged_by_something_else(tmp_path):
    from flowtilt.evaluate.assess import assess

    assess(tmp_path / "e", images=12, steps=2, save_images=True)
    pairs = find_pairs([tmp_path / "e"], None)
    records = score_images(pairs, {"brightness": brightness})
    assert {(r["set"], r["variant"]) for r in records} == {("playground", "base")}
    assert len(records) == 12 and {r["tag"] for r in records} >= {"counting", "position"}
    assert pairs[0].prompt.metadata["include"]


def test_images_of_all_sizes_and_one_that_is_torn(tmp_path):
    grey(tmp_path / "1.png", 255)
    grey(tmp_path / "2.png", 51, (3, 70))
    grey(tmp_path / "3.png", 102, (1, 1))
    whole = to_png(torch.rand(3, 64, 64))
    (tmp_path / "4.png").write_bytes(whole[:2000])
    grey(tmp_path / "5.png", 153)
    records = score_images(find_pairs([tmp_path], None), {"jpeg_compressibility": brightness})
    found = [record["scores"]["jpeg_compressibility"] for record in records]
    assert found[3] is None and "truncated" in records[3]["note"]
    assert [x for x in found if x is not None] == pytest.approx([1, 0.2, 0.4, 0.6], abs=1e-6)


def test_a_reward_that_reads_prompts_is_refused_without_them(tmp_path):
    grey(tmp_path / "1.png", 0)
    with pytest.raises(UserError, match="mine need the prompts"):
        score_images(find_pairs([tmp_path], None), {"mine": PlaygroundPartial(), "theirs": brightness})


def test_the_command_prints_means_and_writes_every_score(tmp_path):
    for k in range(4):
        grey(tmp_path / "images" / f"{k}.png", 50 * k)
    (tmp_path / "p.txt").write_text("same\nsame\nother\nthird\n")
    words = ["score", "images", "--prompts", "p.txt", "--rewards", "jpeg_incompressibility", "-o", "out.csv"]
    code, out, err = typed(*words, cwd=tmp_path).ended()
    assert code == 0, err
    rows = list(csv.DictReader((tmp_path / "out.csv").open()))
    assert [row["prompt"] for row in rows] == ["same", "same", "other", "third"] and len({r["image"] for r in rows}) == 4
    mean = sum(float(row["jpeg_incompressibility"]) for row in rows) / 4
    assert f"{mean:.3f} [" in out


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["images", "--prompts", "p.txt", "--rewards", "jpeg_incompressibility"], "2 images but 3 prompts"),
        (["images", "--rewards", "ocr"], "ocr need the prompts"),
        (["empty", "--rewards", "jpeg_incompressibility"], "no images in empty"),
        (["nowhere", "--rewards", "jpeg_incompressibility"], "no file or folder nowhere"),
        (["images", "--prompts", "q.txt", "--rewards", "jpeg_incompressibility"], "q.txt"),
        (["images", "--rewards", "jpeg_incompressibility", "-o", "out.xls"], ".jsonl or .csv"),
        (["images", "--rewards", "jpegg_compressibility"], "did you mean 'jpeg_compressibility'"),
        (["images", "--rewards", "jpeg_compressibility", "--images-per-prompt", "0"], "at least 1"),
    ],
)
def test_bad_input_is_one_line_and_exit_2(tmp_path, monkeypatch, capsys, words, said):
    monkeypatch.chdir(tmp_path)
    grey(tmp_path / "images" / "1.png", 0)
    grey(tmp_path / "images" / "2.png", 9)
    (tmp_path / "empty").mkdir()
    (tmp_path / "p.txt").write_text("a\nb\nc\n")
    assert main(["score", *words]) == 2
    told = capsys.readouterr().err
    last = told.strip().splitlines()[-1]
    assert "Traceback" not in told
    assert last.startswith("flowtilt: ") and said in last


def test_an_evaluation_without_its_images_is_not_scored_by_its_small_pictures(tmp_path):
    from flowtilt.evaluate.assess import assess

    assess(tmp_path / "e", images=6, steps=2)
    with pytest.raises(UserError, match="with --save-images draws them once more"):
        find_pairs([tmp_path / "e"], None)


def test_an_evaluations_small_pictures_are_no_images(tmp_path):
    from flowtilt.evaluate.assess import assess

    assess(tmp_path / "e", images=6, steps=2, save_images=True)
    assert len(list((tmp_path / "e" / "pictures").rglob("*.png"))) == 6
    assert len(find_pairs([tmp_path], None)) == 6  # a folder with an evaluation in it
    for places, prompts in (([tmp_path / "e"], [Prompt("a")] * 6), ([tmp_path / "e", tmp_path / "e"], None)):
        with pytest.raises(UserError, match="e is an evaluation, which knows its prompts; give it alone and without --prompts"):
            find_pairs(places, prompts)
    (tmp_path / "e" / "results.json").unlink()
    with pytest.raises(UserError, match="e is an evaluation that has not ended"):
        find_pairs([tmp_path / "e"], None)


def test_files_given_one_by_one_stand_in_the_same_order_as_their_folder(tmp_path):
    for k in (1, 2, 10):
        grey(tmp_path / f"{k}.png", k)
    files = sorted(tmp_path.iterdir())  # as a shell gives them: 1, 10, 2
    assert [p.file for p in find_pairs(files, None)] == [p.file for p in find_pairs([tmp_path], None)]


def test_what_was_judged_before_a_judge_failed_is_kept(tmp_path):
    for k in range(40):
        grey(tmp_path / "images" / f"{k}.png", k, (8, 8 + k // 20))
    (tmp_path / "mine.py").write_text("def f(images, prompts):\n    assert images.shape[2] == 8\n    return images.mean((1, 2, 3))\n")
    code, _, err = typed("score", "images", "--rewards", "mine.py:f", "-o", "out.jsonl", cwd=tmp_path).ended()
    assert code == 2 and "reward f failed" in err
    assert len((tmp_path / "out.jsonl").read_text().splitlines()) == 20
