"""`flowtilt score`: which image belongs to which prompt, and images that can't be read."""

import csv
import json
from pathlib import Path

import pytest
import torch
from commands import typed
from PIL import Image

from flowtilt import UserError
from flowtilt.cli import main
from flowtilt.evaluate.gather import grouped
from flowtilt.evaluate.images import save_scores, score_images
from flowtilt.evaluate.pairs import find_pairs
from flowtilt.io.images import to_png
from flowtilt.prompts import Prompt
from flowtilt.prompts.files import read_prompts
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
    with pytest.raises(UserError, match="with --save-images"):
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


# tables that name their images -----------------------------------------------------------------------


def three(folder):
    for k in (1, 2, 10):
        grey(folder / f"{k}.png", 20 * k)


def found(pairs):
    return [(p.file.name, p.prompt.text, p.index, p.copy) for p in pairs]


NAMED = [("1.png", "red", 0, 0), ("2.png", "green", 1, 0), ("10.png", "red", 0, 1)]


@pytest.mark.parametrize("column", ["file_name", "image", "path", "Image"])
@pytest.mark.parametrize("place", ["", "images/", "elsewhere/on/another/machine/", "C:\\data\\"])
@pytest.mark.parametrize("ending", [".png", ""])
def test_a_table_pairs_by_the_names_that_it_gives(tmp_path, column, place, ending):
    three(tmp_path / "images")
    rows = [("10", "red"), ("1", "red"), ("2", "green")]
    (tmp_path / "t.csv").write_text("\n".join([f"{column},prompt", *(f"{place}{name}{ending},{text}" for name, text in rows)]))
    lines = [json.dumps({column: f"{place}{name}{ending}", "prompt": text, "label": 3}) for name, text in rows]
    (tmp_path / "t.jsonl").write_text("\n".join(lines))
    for table in (tmp_path / "t.csv", tmp_path / "t.jsonl"):
        assert found(find_pairs([tmp_path / "images"], read_prompts(table), table=table)) == NAMED


@pytest.mark.parametrize("where", ["metadata.jsonl", "metadata.csv", "train/metadata.jsonl"])
def test_an_imagefolder_brings_its_captions(tmp_path, where):
    table = tmp_path / where
    three(table.parent)
    rows = [("10.png", "red"), ("1.png", "red"), ("2.png", "green")]
    csv_text = "file_name,text\n" + "".join(f"{name},{text}\n" for name, text in rows)
    json_text = "".join(json.dumps({"file_name": name, "text": text}) + "\n" for name, text in rows)
    table.write_text(csv_text if table.suffix == ".csv" else json_text)
    assert found(find_pairs([tmp_path], None)) == NAMED


def test_rows_and_images_without_a_partner_are_said_and_left_out(tmp_path, capsys):
    three(tmp_path)
    (tmp_path / "metadata.csv").write_text("file_name,text\n7.png,blue\n2.png,green\n8.png,blue\n")
    assert found(find_pairs([tmp_path], None)) == [("2.png", "green", 0, 0)]
    said = capsys.readouterr().err
    assert "2 of 3 rows left out, as the image is not among those given, 7.png first" in said
    assert "2 of 3 images left out, as no row of" in said and f"{tmp_path / '1.png'} first" in said


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (["1.png,red", "2.png,green", "./1.png,blue"], r"t\.csv:2 and .*t\.csv:4 both name .*1\.png; keep one row per image"),
        (["7.png,red", "8.png,red"], r't\.csv:2 names the image "7\.png", which is not among the 3 images given'),
        (["1.png,red", ",green"], r"t\.csv:3: no image in the row"),
    ],
)
def test_names_that_do_not_fit_are_refused(tmp_path, rows, message):
    three(tmp_path)
    table = tmp_path / "t.csv"
    table.write_text("\n".join(["image,prompt", *rows]))
    with pytest.raises(UserError, match=message):
        find_pairs([tmp_path], read_prompts(table), table=table)


def test_a_name_that_may_be_one_of_two_images_is_refused(tmp_path):
    three(tmp_path / "images" / "a")
    three(tmp_path / "images" / "b")
    table = tmp_path / "t.csv"
    table.write_text("image,prompt\n1.png,red\n")
    with pytest.raises(UserError, match=r"t\.csv:2: 1\.png may be .*a.1\.png or .*b.1\.png; write its path"):
        find_pairs([tmp_path / "images"], read_prompts(table), table=table)
    table.write_text("image,prompt\nb/1.png,red\n")
    assert find_pairs([tmp_path / "images"], read_prompts(table), table=table)[0].file == tmp_path / "images" / "b" / "1.png"
    with pytest.raises(UserError, match="leave --images-per-prompt out"):
        find_pairs([tmp_path / "images"], read_prompts(table), 2, table)


def test_what_score_wrote_pairs_its_own_images_again(tmp_path):
    three(tmp_path)
    table = tmp_path / "scores.csv"
    pairs = find_pairs([tmp_path], [Prompt("red"), Prompt("green"), Prompt("blue")])
    save_scores(table, score_images(pairs, {"brightness": brightness}))
    again = find_pairs([tmp_path], read_prompts(table)[::-1], table=table)
    assert [(p.file, p.prompt.text) for p in again] == [(p.file, p.prompt.text) for p in pairs]


# a run's samples, hidden and other files -------------------------------------------------------------


def test_a_runs_samples_bring_their_captions(tmp_path):
    for step in (0, 2):
        folder = tmp_path / "samples" / f"step-{step:06d}"
        for k in range(2):
            grey(folder / f"{k:02d}.png", 30 * k)
        rows = [{"file": f"{k:02d}.png", "prompt": f"prompt {1 - k}", "tag": "t", "score": 1.0, "note": ""} for k in range(2)]
        (folder / "index.json").write_text(json.dumps(rows))
    (tmp_path / "recipe.toml").write_text("")
    for places, steps in (([tmp_path / "samples" / "step-000002"], (2,)), ([tmp_path / "samples"], (0, 2)), ([tmp_path], (0, 2))):
        pairs = find_pairs(places, None)
        assert [(p.set, p.prompt.text, p.prompt.tag) for p in pairs] == [
            (f"step-{s:06d}", f"prompt {1 - k}", "t") for s in steps for k in (0, 1)
        ]
    (tmp_path / "samples" / "step-000002" / "01.png").unlink()
    with pytest.raises(UserError, match=r"step-000002 lacks 1 image of its index\.json, 01\.png first"):
        find_pairs([tmp_path], None)
    (tmp_path / "samples" / "step-000002" / "index.json").write_text("[" * 100_000)
    with pytest.raises(UserError, match=r"index\.json can't be read"):
        find_pairs([tmp_path], None)


def test_an_index_of_another_program_is_left_alone(tmp_path):
    three(tmp_path)
    for content in ('{"images": 3}', "[1]", '[{"file": "../x.png", "prompt": "a"}]'):
        (tmp_path / "index.json").write_text(content)
        assert len(find_pairs([tmp_path], None)) == 3


def test_a_name_that_no_file_system_allows_is_refused_in_one_line(tmp_path):
    (tmp_path / "index.json").write_text(json.dumps([{"file": "9" * 5000, "prompt": "a"}]))
    with pytest.raises(UserError, match=r"lacks 1 image of its index\.json"):
        find_pairs([tmp_path], None)
    with pytest.raises(UserError, match="no file or folder"):
        find_pairs([tmp_path / ("9" * 5000)], None)


def test_every_format_is_found_hidden_folders_are_not_and_the_rest_is_said(tmp_path, capsys):
    for name in ("1.avif", "2.gif", "3.jfif", "4.jp2", "5.PNG"):
        grey(tmp_path / name, 9, (16, 16))
    for name in (".ipynb_checkpoints/5-checkpoint.png", "__MACOSX/._5.png", "._5.png", "a/.thumbs/1.png"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"")
    for name in ("6.heic", "7.jxl", "notes.txt"):
        (tmp_path / name).write_bytes(b"")
    pairs = find_pairs([tmp_path], None)
    assert [p.file.name for p in pairs] == ["1.avif", "2.gif", "3.jfif", "4.jp2", "5.PNG"]
    said = capsys.readouterr().err
    assert "2 files left out" in said and "6.heic first" in said and said.count("\n") == 1
    assert all(record["scores"]["b"] is not None for record in score_images(pairs, {"b": brightness}))


def test_a_contact_sheet_of_sample_has_no_score_and_is_named(tmp_path):
    from flowtilt.evaluate.side_by_side import sample

    sample(["a red circle", "a blue square"], tmp_path / "sheet.png", steps=1)
    grey(tmp_path / "z.png", 51)
    first, second = score_images(find_pairs([tmp_path], None), {"b": brightness})
    assert first["scores"]["b"] is None and "contact sheet" in first["note"]
    assert second["scores"]["b"] == pytest.approx(0.2)


def test_images_of_the_base_and_of_the_tuned_model_are_told_apart_by_their_row():
    rows = [(Path(f"{k}.png"), Prompt("a cat", metadata={"variant": who})) for k, who in enumerate(["base", "base", "tuned", "tuned", "x"])]
    assert [(pair.variant, pair.copy) for pair in grouped(rows)] == [("base", 0), ("base", 1), ("tuned", 0), ("tuned", 1), ("tuned", 2)]
