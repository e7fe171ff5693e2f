"""The page and the table of an evaluation: every mean with its interval, nothing missing hidden, safe whatever a prompt says."""

import json
import math
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
from evaluations import NAN, TAGS, results_of, write
from PIL import Image
from test_report import HOSTILE, Page

from flowtilt.errors import UserError
from flowtilt.report.evaluation import write_evaluation_page
from flowtilt.report.evaluation.loading import load
from flowtilt.report.evaluation.terminal import table


@pytest.fixture
def two(tmp_path: Path) -> Path:
    """An evaluation of a tuned model and its base."""
    return write(tmp_path / "two", ("tuned", "base"))


@pytest.fixture
def one(tmp_path: Path) -> Path:
    """An evaluation of one model."""
    return write(tmp_path / "one", ("tuned",))


def report(folder: Path) -> Page:
    page = Page(write_evaluation_page(folder).read_text())
    assert not page.open, f"left open: {page.open}"
    return page


def results(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "results.json").read_text())


def change(folder: Path, **more: Any) -> None:
    (folder / "results.json").write_text(json.dumps(results(folder) | more))


def change_rows(folder: Path, **more: Any) -> None:
    rows = [json.loads(line) for line in (folder / "scores.jsonl").read_text().splitlines()]
    (folder / "scores.jsonl").write_text("".join(json.dumps(row | more) + "\n" for row in rows))


# the page --------------------------------------------------------------------------------------------


def test_the_page_lies_in_the_folder_and_says_what_was_evaluated_and_how(two: Path) -> None:
    assert write_evaluation_page(two) == two / "report.html"
    page = report(two)
    assert page.says("stable-diffusion-3.5-medium with nft-geneval")
    assert page.says("euler, 40 solver steps, guidance 1, 512 px, 2 images per prompt, seed 0, float32")
    assert page.says("geneval on geneval · mean over images") and page.says("geneval 36 prompts, 72 images")
    assert page.says("rewards.pickscore.revision abc123") and page.says("lora.0.sha256 9f9f")
    assert page.says("ocr on drawbench: its prompts quote no text") and page.says("what papers print")


def test_every_mean_stands_with_its_interval(two: Path) -> None:
    page = report(two)
    for one in results(two)["sets"].values():
        for column in one["columns"].values():
            for variant in ("tuned", "base"):
                mean, low, high = (column[variant][key] for key in ("mean", "low", "high"))
                assert page.says(f"{mean:.3f} [{low:.3f}, {high:.3f}]")


def test_both_means_of_geneval_are_named_and_each_tag_is_listed(two: Path) -> None:
    page, of = report(two), results(two)["sets"]["geneval"]["columns"]["geneval"]
    assert page.says(f"mean over images {of['base']['mean']:.3f} [") and page.says(
        f"mean over tags {of['base']['mean_of_tags']['mean']:.3f} ["
    )
    for tag in TAGS:
        assert page.says(f"{tag} {of['base']['by_tag'][tag]['mean']:.3f} [")


def test_missing_scores_are_counted_beside_the_mean_and_shown(two: Path) -> None:
    page = report(two)
    assert page.text.count("2 of 72 missing") >= 4 and page.text.count("2 of 24 missing") >= 4
    assert page.says("Some images have no score : geneval on geneval, pickscore on geneval, pickscore on drawbench and 1 more.")
    assert page.says("4 of 144 images lack a score: geneval 4, pickscore 4.")
    assert page.says("base, prompt 0, copy 1 no geneval, pickscore: 503: no answer")


def test_where_nothing_is_missing_nothing_is_said_to_be(one: Path) -> None:
    rows = [json.loads(line) for line in (one / "scores.jsonl").read_text().splitlines()]
    rows = [row for row in rows if row["index"]]
    (one / "scores.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (one / "results.json").write_text(json.dumps(results_of(rows, ("tuned",))))
    page = report(one)
    assert page.says("Every image has every score.") and "missing" not in page.text


def test_differences_say_in_words_whether_the_interval_excludes_zero(two: Path) -> None:
    found = results(two)
    columns = found["sets"]["geneval"]["columns"]
    columns["pickscore"]["difference"] |= {"mean": -0.01, "low": -0.02, "high": -0.004}
    columns["geneval/strict"]["difference"] |= {"mean": 0.01, "low": -0.02, "high": 0.04}
    columns["pickscore/raw"]["difference"] |= {"low": None, "high": None}
    change(two, sets=found["sets"])
    page = report(two)
    assert page.says("geneval +0.200 [+0.200, +0.200] 2 of 72 missing 100% / 0% higher excludes 0")
    assert page.says("−0.010 [−0.020, −0.004] 2 of 72 missing 100% / 0% lower excludes 0")
    assert page.says("+0.010 [−0.020, +0.040] 2 of 72 missing 100% / 0% may be chance includes 0")
    assert page.says("no interval scores per prompt are not known")
    assert page.says("Of 4 scores, compared image by image, tuned is higher in 3, lower in 1.")


@pytest.mark.parametrize(
    ("mean", "low", "high", "says"),
    [
        (0.2, 0.1, 0.3, "Compared image by image, tuned scores higher : the interval of the difference excludes 0."),
        (0.1, -0.1, 0.3, "Compared image by image, the difference may be chance: its interval includes 0."),
        (0.0, -0.1, 0.1, "Compared image by image, tuned and base score the same on average."),
        (0.4, None, None, "Compared image by image, the difference has no interval, so it may be chance."),
    ],
)
def test_of_one_score_the_headline_says_what_its_difference_is(
    two: Path, mean: float, low: float | None, high: float | None, says: str
) -> None:
    column = results(two)["sets"]["drawbench"]["columns"]["aesthetic"]
    column["difference"] |= {"mean": mean, "low": low, "high": high}
    change(two, sets={"drawbench": {"prompts": 12, "images": 24, "columns": {"aesthetic": column}}})
    page = report(two)
    assert page.says(says) and "Of 1 score" not in page.text


def test_an_evaluation_of_two_prompts_calls_nothing_significant(two: Path) -> None:
    """Also of a file that has an interval for them."""
    column = results(two)["sets"]["drawbench"]["columns"]["aesthetic"]
    for part in column.values():
        part.pop("prompts")
    change(two, sets={"drawbench": {"prompts": 2, "images": 24, "columns": {"aesthetic": column}}})
    page = report(two)
    assert "95% interval 0." not in page.text and not page.says("higher excludes 0")
    assert page.says("no interval: 2 prompts, at least 10 are needed") and page.says("No interval: 2 prompts, at least 10 are needed.")


@pytest.mark.parametrize(
    ("path", "title"),
    [
        ("/x/runs/playground/lora/pytorch_lora_weights.safetensors", "playground with the LoRA of runs/playground"),
        ("playground/lora/pytorch_lora_weights.safetensors", "playground with the LoRA of playground"),
        ("/x/runs/mine", "playground with mine"),
    ],
)
def test_a_lora_that_is_called_like_its_model_is_told_from_it(two: Path, path: str, title: str) -> None:
    change(two, protocol={"model": "playground", "lora": [{"path": path}]})
    assert report(two).says(title)


def test_what_could_not_be_read_is_said_once(two: Path) -> None:
    with (two / "scores.jsonl").open("ab") as file:
        file.write(b'\xff\xfe\n{"index": "x"}\n{"set": "a", "index": 1, "scores": 3}\n' + b"\0" * 20)
    page = report(two)
    said = "scores.jsonl: 1 line cannot be read, 1 line without the place of a prompt, 1 line without scores"
    assert page.says(f"Not all of the folder's files could be read: {said}.")


def test_one_variant_has_no_differences_and_no_arrow(one: Path) -> None:
    page = report(one)
    assert not page.says("Tuned minus base") and "→" not in page.text and not page.says("base")
    assert len(page.all("img")) == 24 + 2 + 22 + 2  # 12 and 12 of 70 with a score, 11 and 11 of 22, and those without


def test_the_base_is_shown_beside_the_same_image(two: Path) -> None:
    alts = [image["alt"] or "" for image in report(two).all("img")]
    for base, tuned in zip(alts[:48:2], alts[1:48:2], strict=True):
        (prompt, was), (same, now) = (re.fullmatch(r"(.*), (?:base|tuned), geneval ([\d.]+)", alt).groups() for alt in (base, tuned))  # type: ignore[union-attr]
        assert prompt == same and float(now) - float(was) == pytest.approx(0.2)
    shown = [float(alt.rsplit(" ", 1)[1]) for alt in alts[1:48:2]]
    assert shown[:12] == sorted(shown[:12]) and shown[12:] == sorted(shown[12:], reverse=True) and max(shown[:12]) <= min(shown[12:])


def test_the_page_loads_nothing_from_anywhere_and_runs_nothing(two: Path) -> None:
    page = report(two)
    assert not page.all("script") and not page.all("link")
    for _, attrs in page.elements:
        for name in ("src", "href", "xlink:href", "srcset", "data", "action", "poster"):
            value = attrs.get(name)
            assert value is None or value.startswith(("data:image/", "#")), f"{name}={value[:60]}"
    assert "url(" not in page.html and "@import" not in page.html and "http" not in page.html.replace("http-equiv", "")
    policy = next(a["content"] for a in page.all("meta") if a.get("http-equiv") == "Content-Security-Policy")
    assert policy == "default-src 'none'; img-src data:; style-src 'unsafe-inline'"


def test_the_page_can_be_read_without_seeing_it_and_without_a_mouse(two: Path) -> None:
    page = report(two)
    assert page.all("html")[0]["lang"] == "en" and all(image["alt"] for image in page.all("img"))
    assert all(box.get("tabindex") == "0" and box.get("aria-label") for box in page.all("div") if box.get("class") == "scroll")
    assert all(svg.get("aria-hidden") == "true" for svg in page.all("svg"))
    headings = [attrs.get("scope") for attrs in page.all("th")]
    assert set(headings) - {None} == {"col", "row", "rowgroup"}
    anchors = {attrs["id"] for _, attrs in page.elements if attrs.get("id")}
    assert {(a["href"] or "")[1:] for a in page.all("a")} <= anchors


def test_hostile_text_stays_text(two: Path) -> None:
    found = results(two)
    geneval = found["sets"]["geneval"]
    for variant in ("tuned", "base"):
        of = geneval["columns"]["geneval"][variant]
        of["by_tag"] = {HOSTILE: of["by_tag"]["colors"]}
    sets = {HOSTILE: geneval | {"columns": {HOSTILE: geneval["columns"]["geneval"], "b/" + HOSTILE: geneval["columns"]["pickscore"]}}}
    protocol = {"model": HOSTILE, "lora": [{"path": HOSTILE}], "solver": HOSTILE, "dtype": HOSTILE, HOSTILE: {HOSTILE: [HOSTILE]}}
    change(two, sets=sets, protocol=protocol, left_out=[{"set": HOSTILE, "reward": HOSTILE, "why": HOSTILE}])
    change_rows(two, set=HOSTILE, prompt=HOSTILE, tag=HOSTILE, note=HOSTILE, scores={HOSTILE: 0.5})
    page = report(two)
    assert not page.all("script")
    assert not [name for _, attrs in page.elements for name in attrs if name.startswith("on")]
    assert all((image["src"] or "").startswith("data:image/") for image in page.all("img"))
    assert page.text.count(HOSTILE) >= 40


def test_prompts_that_are_no_unicode_or_very_long_are_shown(one: Path) -> None:
    change_rows(one, prompt="\ud800 \u202e \u2028 " + "very " * 200 + "long")
    page = report(one)
    long = [caption for caption in page.all("figcaption") if caption.get("class") == "long"]
    assert long and all(caption["tabindex"] == "0" for caption in long) and "very long" in page.text


@pytest.mark.parametrize("path", ["../secret.png", "/etc/passwd", "{abs}", "link.png", "\0", "x" * 5000, 7, ["a"], ""])
def test_scores_cannot_pull_in_files_from_elsewhere(one: Path, path: Any) -> None:
    secret = one.parent / "secret.png"
    Image.new("RGB", (8, 8), (255, 0, 0)).save(secret)
    (one / "link.png").symlink_to(secret)
    change_rows(one, picture=str(secret) if path == "{abs}" else path)
    page = report(one)
    assert not page.all("img") and page.says("no picture")


# odd folders -----------------------------------------------------------------------------------------


def test_a_folder_without_results_is_refused_in_one_line(tmp_path: Path) -> None:
    for folder in (tmp_path, tmp_path / "typo"):
        with pytest.raises(UserError, match=r"no results\.json") as caught:
            write_evaluation_page(folder)
        assert "\n" not in str(caught.value) and str(folder) in str(caught.value)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["results.json", "scores.jsonl"])
@pytest.mark.parametrize(
    "content", [b"", b"{", b"[1, 2]", b"\xff\xfe\x00", b"null\n7\n", b"[" * 100_000, b'{"sets": {"a": {"columns": 3}, "b": 1}}']
)
def test_either_file_may_be_broken(two: Path, name: str, content: bytes) -> None:
    (two / name).write_bytes(content)
    page = report(two)
    assert page.says("no scores") or page.says("scores.jsonl")


@pytest.mark.parametrize("value", [NAN, math.inf, None, "text", True, 10**400, [1], {}, -1e308, 0], ids=lambda v: str(v)[:6])
def test_values_that_are_no_numbers_are_missing_pieces(two: Path, value: Any) -> None:
    def broken(tree: Any, at: str) -> Any:
        return {k: value if k == at else broken(v, at) for k, v in tree.items()} if isinstance(tree, dict) else tree

    shutil.rmtree(two / "pictures")  # so that a hundred pages take seconds, and few rows
    rows = (two / "scores.jsonl").read_text().splitlines(keepends=True)
    (two / "scores.jsonl").write_text("".join(rows[:8] + rows[-8:]))
    whole = results(two)
    keys = (
        "mean",
        "low",
        "high",
        "images",
        "missing",
        "wins",
        "tuned",
        "base",
        "difference",
        "by_tag",
        "mean_of_tags",
        "geneval",
        "columns",
    )
    for key in (*keys, "sets", "protocol", "variants", "left_out", "seconds", "model", "lora", "steps"):
        (two / "results.json").write_text(json.dumps(broken(whole, key)))
        page = report(two)
        drawn = [v for _, attrs in page.elements for name in ("x", "cx", "x1", "x2", "width") if (v := attrs.get(name))]
        assert not any(bad in v for v in drawn for bad in ("nan", "inf")), key
        assert max(map(len, table(results(two)).splitlines())) <= 110
    (two / "results.json").write_text(json.dumps(whole))
    for key in ("set", "index", "copy", "prompt", "tag", "variant", "scores", "note", "picture"):
        before = (two / "scores.jsonl").read_bytes()
        change_rows(two, **{key: value})
        report(two)
        (two / "scores.jsonl").write_bytes(before)


def test_a_line_separator_in_a_prompt_does_not_cut_its_line(tmp_path: Path) -> None:
    row = {"set": "a", "index": 0, "copy": 0, "prompt": "one\u2028two\x85three", "variant": "tuned", "scores": {}}
    (tmp_path / "scores.jsonl").write_text(json.dumps(row, ensure_ascii=False) + "\n" + '{"set": "a", "ind', encoding="utf-8")
    assert [image.prompt for image in load(tmp_path)[1]] == ["one\u2028two\x85three"]


def test_a_repeated_image_counts_once_and_the_last_line_holds(tmp_path: Path) -> None:
    rows = [{"set": "a", "index": 0, "copy": 0, "variant": "tuned", "scores": {"x": score}} for score in (0.1, 0.7)]
    (tmp_path / "scores.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert [image.score("x") for image in load(tmp_path)[1]] == [0.7]


def test_pictures_that_are_broken_or_absent_leave_a_gap(one: Path) -> None:
    for path in sorted((one / "pictures").iterdir())[::2]:
        path.write_bytes(b"no picture")
    assert report(one).says("no picture") and report(one).all("img")


def test_an_old_page_survives_a_failing_write(two: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    old = write_evaluation_page(two).read_text()
    change(two, seconds=1.0)

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(UserError, match="No space left"):
        write_evaluation_page(two)
    assert (two / "report.html").read_text() == old


def test_the_same_folder_gives_the_same_bytes(two: Path) -> None:
    assert write_evaluation_page(two).read_bytes() == write_evaluation_page(two).read_bytes()
