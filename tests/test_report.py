"""The report of a run: complete offline, honest about what is missing, and safe whatever a prompt says."""

import json
import math
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from flowtilt.errors import UserError
from flowtilt.io.locks import Hold
from flowtilt.report import write_report
from flowtilt.report.numbers import short

VOID = {"meta", "img", "link", "br", "hr", "input"}
HOSTILE = "\"'><script>alert(1)</script><img src=http://evil.example/x onerror=alert(2)>"


class Page(HTMLParser):
    """A report as parsed: its elements, its text, and whether every element is closed."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.html = html
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.open: list[str] = []
        self.feed(html)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open and self.open.pop() == tag, f"</{tag}> closes nothing"

    def handle_data(self, data: str) -> None:
        if not self.open or self.open[-1] not in ("script", "style"):
            self.text += " " + data

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attrs for name, attrs in self.elements if name == tag]

    def says(self, sentence: str) -> bool:
        return " ".join(sentence.split()) in " ".join(self.text.split())


def lines(path: Path, records: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))


def step_record(step: int, **more: Any) -> dict[str, Any]:
    reward = 0.4 + 0.01 * step
    shown = {"rollout": step, "reward/playground": reward, "reward/total": reward, "loss": 0.5, "lr": 7e-4, "images_per_second": 90.1}
    return shown | {"time/sample": 0.3, "time/train": 0.7, "seconds": 1.5 * step, "network_evaluations": 1000 * step} | more


def evaluation(step: int, score: Any, prompts: int = 40, **more: Any) -> dict[str, Any]:
    base = {"rollout": step, "score": score, "images": 240, "by_tag": {"counting": 0.2 + step / 50}, "seconds": 1.5 * step}
    known = isinstance(score, float) and math.isfinite(score)
    between = {"low": score - 0.06, "high": score + 0.05} if known else {}
    estimate = {"mean": score, **between, "images": 240, "missing": 0, "prompts": prompts}
    return base | {"column": "playground_strict", "rewards": {"playground_strict": score}, "estimate": estimate} | more


def image_scores(run: Path, step: int, scores: list[float | None], copies: int = 2, column: str = "playground_strict") -> None:
    """The scores of `copies` images of each of several prompts, as an evaluation keeps them."""
    folder = run / "samples" / f"step-{step:06d}"
    folder.mkdir(parents=True, exist_ok=True)
    prompts = [k // copies for k in range(len(scores))]
    found = {"column": column, "captions": "same", "prompt": prompts, "tag": [""] * len(scores), "score": scores}
    (folder / "scores.json").write_text(json.dumps(found))


def samples(run: Path, step: int, size: int = 32, **more: Any) -> Path:
    folder = run / "samples" / f"step-{step:06d}"
    folder.mkdir(parents=True)
    index = [
        {"file": "00.png", "prompt": "two red circles", "tag": "counting", "score": 0.0, "note": "3 objects, not 2"},
        {"file": "01.png", "prompt": "a cross", "tag": "single_object", "score": 1.0, "note": ""},
    ]
    pixels = np.random.default_rng(step).integers(0, 255, (size, size, 3), dtype=np.uint8)
    for entry in index:
        Image.fromarray(pixels).save(folder / str(entry["file"]))
    (folder / "index.json").write_text(json.dumps([entry | more for entry in index]))
    return folder


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A finished run of 30 rollouts with three evaluations and one guard."""
    folder = tmp_path / "runs" / "first"
    folder.mkdir(parents=True)
    (folder / "recipe.toml").write_text('name = "playground"\nprompts = "playground"\nsteps = 30\nseed = 0\n')
    (folder / "environment.json").write_text(json.dumps({"device": "cpu", "threads": 2, "versions": {"torch": "2.9.0"}}))
    lines(folder / "metrics.jsonl", [step_record(step) for step in range(1, 31)])
    lines(folder / "evaluations.jsonl", [evaluation(0, 0.31), evaluation(15, 0.64), evaluation(30, 0.93)])
    lines(folder / "guards.jsonl", [{"rollout": 12, "guard": "deviation", "message": "v_theta is v_old"}])
    for step in (0, 15, 30):
        samples(folder, step)
    summary = {"recipe": "playground", "seed": 0, "steps": 30, "seconds": 45.0, "score": {"before": 0.31, "after": 0.93}}
    (folder / "summary.json").write_text(json.dumps(summary | {"protocol": "EMA weights, 240 images, 20 euler steps"}))
    return folder


def report(run: Path) -> Page:
    page = Page(write_report(run).read_text())
    assert not page.open, f"left open: {page.open}"
    return page


def test_the_report_lies_in_the_run_and_says_the_result_in_one_sentence(run: Path) -> None:
    assert write_report(run) == run / "report.html"
    page = report(run)
    assert page.says("the held-out score rose from 0.31 to 0.93 in 30 rollouts, 45 s of training.")
    assert page.says("Protocol: EMA weights, 240 images, 20 euler steps")
    assert page.says("240 images of 40 prompts 95% interval 0.25 to 0.36")
    assert page.says("counting 0.20 0.80")
    assert page.says("deviation at rollout 12: v_theta is v_old")
    assert page.says("3 objects, not 2") and page.says("Right: 1 of 2 before")
    assert page.says("sample sampling the images 0.300 30%")
    assert page.says("versions.torch 2.9.0") and page.says('prompts = "playground"')


def test_the_page_loads_nothing_from_anywhere(run: Path) -> None:
    page = report(run)
    for _, attrs in page.elements:
        for name in ("src", "href", "xlink:href", "srcset", "data", "action", "poster"):
            value = attrs.get(name)
            assert value is None or value.startswith(("data:image/", "#")), f"{name}={value[:60]}"
    assert "url(" not in page.html and "@import" not in page.html and "http" not in page.html.replace("http-equiv", "")
    policy = next(a["content"] for a in page.all("meta") if a.get("http-equiv") == "Content-Security-Policy")
    assert policy and "default-src 'none'" in policy


def test_the_page_can_be_read_without_seeing_it(run: Path) -> None:
    page = report(run)
    assert page.all("html")[0]["lang"] == "en" and len(page.all("title")) >= 1
    assert page.all("img") and all(image["alt"] for image in page.all("img"))
    charts = [svg for svg in page.all("svg") if svg.get("role") == "img"]
    assert charts and all(svg.get("aria-label") for svg in charts)
    assert any("0.31 at rollout 0, 0.93 at rollout 30" in (svg["aria-label"] or "") for svg in charts)


def test_columns_of_the_grid_are_before_during_and_after(run: Path) -> None:
    alts = [image["alt"] or "" for image in report(run).all("img")]
    assert alts[:3] == [f"two red circles, {when}: wrong, 3 objects, not 2" for when in ("before", "rollout 15", "after")]
    assert alts[3] == "a cross, before: right"


def test_many_evaluations_leave_at_most_four_columns_with_the_first_and_the_last(run: Path) -> None:
    for step in (3, 6, 9, 12, 18, 21):
        samples(run, step)
    alts = [image["alt"] or "" for image in report(run).all("img")]
    assert len(alts) == 8 and "before" in alts[0] and "after" in alts[3]


def test_hostile_text_stays_text(run: Path) -> None:
    (run / "recipe.toml").write_text(f"name = '''{HOSTILE}'''\n# {HOSTILE}\n")
    (run / "environment.json").write_text(json.dumps({HOSTILE: {HOSTILE: HOSTILE}}))
    lines(run / "metrics.jsonl", [step_record(1, **{HOSTILE: 1.0, f"time/{HOSTILE}": 1.0}), step_record(2)])
    hostile = evaluation(30, 0.5, by_tag={HOSTILE: 0.5}, rewards={HOSTILE: 0.5, HOSTILE + "2": 0.1})
    lines(run / "evaluations.jsonl", [evaluation(0, 0.3, by_tag={HOSTILE: 0.2}), hostile])
    lines(run / "guards.jsonl", [{"rollout": 1, "guard": HOSTILE, "message": HOSTILE}])
    (run / "summary.json").write_text(json.dumps({"recipe": HOSTILE, "steps": 30, "protocol": HOSTILE, "seed": HOSTILE}))
    folder = samples(run, 20, prompt=HOSTILE, tag=HOSTILE, note=HOSTILE)
    for step in (0, 15, 30):
        (run / "samples" / f"step-{step:06d}" / "index.json").write_text((folder / "index.json").read_text())
    page = report(run)
    assert len(page.all("script")) == 1
    assert not [name for _, attrs in page.elements for name in attrs if name.startswith("on")]
    assert all((image["src"] or "").startswith("data:image/") for image in page.all("img"))
    assert page.text.count(HOSTILE) >= 8


def test_an_index_cannot_pull_in_files_from_elsewhere(run: Path) -> None:
    Image.new("RGB", (8, 8), (255, 0, 0)).save(run / "secret.png")
    for step in (0, 15, 30):
        folder = run / "samples" / f"step-{step:06d}"
        (folder / "index.json").write_text(json.dumps([{"file": "../../secret.png", "prompt": "p", "score": 1.0, "note": ""}]))
    page = report(run)
    assert not page.all("img") and page.says("no image")


def test_an_empty_folder_gives_a_page_that_says_what_is_missing(tmp_path: Path) -> None:
    page = report(tmp_path)
    for sentence in (
        "nothing is logged yet",
        "No evaluation yet",
        "No rollout is logged yet",
        "No samples yet",
        "No guard fired",
        "No timings",
    ):
        assert page.says(sentence), sentence
    assert page.says("The folder holds no recipe.toml.") and page.says("The folder holds no environment.json.")


@pytest.mark.parametrize("name", ["recipe.toml", "environment.json", "metrics.jsonl", "evaluations.jsonl", "guards.jsonl", "summary.json"])
@pytest.mark.parametrize("content", [None, b"", b"{", b"[1, 2]", b"\xff\xfe\x00", b'{"rollout": "x", "score": []}\n', b"null\n7\n"])
def test_any_one_file_may_be_missing_or_broken(run: Path, name: str, content: bytes | None) -> None:
    (run / name).unlink()
    if content is not None:
        (run / name).write_bytes(content)
    report(run)


def test_a_broken_image_or_index_leaves_a_gap(run: Path) -> None:
    (run / "samples" / "step-000000" / "00.png").write_bytes(b"not an image")
    (run / "samples" / "step-000015" / "index.json").write_text("[{")
    (run / "samples" / "step-000030" / "01.png").unlink()
    page = report(run)
    assert len(page.all("img")) == 2 and page.says("no image")


def test_a_run_that_goes_on_says_how_far_it_is(run: Path) -> None:
    (run / "summary.json").unlink()
    lines(run / "metrics.jsonl", [step_record(step) for step in range(1, 18)])
    lines(run / "evaluations.jsonl", [evaluation(0, 0.31), evaluation(15, 0.64)])
    page = report(run)
    assert page.says("the held-out score has risen from 0.31 to 0.64 by rollout 15 of 30.")
    assert page.says("interrupted at 17 of 30 rollouts")
    hold = Hold(run, "a training run")
    try:
        assert report(run).says("running at 17 of 30 rollouts")
    finally:
        hold.release()
    assert report(run).says("interrupted at 17 of 30 rollouts")


def test_an_old_summary_does_not_end_a_run_that_was_made_longer(run: Path) -> None:
    lines(run / "metrics.jsonl", [step_record(step) for step in range(1, 41)])
    assert report(run).says("interrupted at")


def test_only_the_base_was_evaluated_yet(run: Path) -> None:
    (run / "summary.json").unlink()
    lines(run / "metrics.jsonl", [step_record(1)])
    lines(run / "evaluations.jsonl", [evaluation(0, 0.31)])
    page = report(run)
    assert page.says("the base has a held-out score of 0.31; no later evaluation yet, 1 of 30 rollouts done.")
    assert page.says("Only rollout 0 has been evaluated so far.")


def test_the_summary_stands_in_for_missing_evaluations(run: Path) -> None:
    (run / "evaluations.jsonl").unlink()
    assert report(run).says("rose from 0.31 to 0.93 in 30 rollouts")


def test_a_fall_is_called_a_fall_and_shows_enough_digits(run: Path) -> None:
    lines(run / "evaluations.jsonl", [evaluation(0, 0.2907), evaluation(30, 0.2831)])
    assert report(run).says("fell from 0.291 to 0.283")


def test_training_prompts_are_not_called_held_out(run: Path) -> None:
    (run / "recipe.toml").write_text('prompts = "mine.txt"\nsteps = 30\n[evaluate]\nevery = 10\n')
    page = report(run)
    assert page.says("the score on the training prompts rose") and "held-out" not in page.text


def test_a_torn_last_line_is_ignored(run: Path) -> None:
    before = report(run).text
    for name in ("metrics.jsonl", "evaluations.jsonl", "guards.jsonl"):
        with (run / name).open("a") as file:
            file.write('{"rollout": 31, "sco')
    assert report(run).text == before


def test_steps_repeated_after_a_resume_count_once(run: Path) -> None:
    before = write_report(run).read_text()
    with (run / "metrics.jsonl").open("a") as file:
        file.write("".join(json.dumps(step_record(step)) + "\n" for step in range(20, 31)))
    assert write_report(run).read_text() == before


def test_one_step_is_drawn_as_a_dot(run: Path) -> None:
    lines(run / "metrics.jsonl", [step_record(1)])
    lines(run / "evaluations.jsonl", [evaluation(0, 0.31)])
    page = report(run)
    assert any("dot" in (circle.get("class") or "") for circle in page.all("circle"))
    assert (
        "nan" not in " ".join(str(value) for _, attrs in page.elements for value in attrs.values() if len(str(value)) < 500).lower().split()
    )


@pytest.mark.parametrize("value", [math.nan, math.inf, None, "text", True, 10**400, [1], -1e308], ids=lambda v: str(v)[:6])
def test_values_that_are_no_numbers_are_gaps(run: Path, value: Any) -> None:
    broken = {"loss": value, "reward/total": value, "time/train": value, "seconds": value}
    lines(run / "metrics.jsonl", [step_record(s, **(broken if s in (3, 4, 9) else {})) for s in range(1, 16)])
    lines(run / "evaluations.jsonl", [evaluation(0, 0.31), evaluation(15, value), evaluation(30, 0.93)])
    page = report(run)
    assert page.says("from 0.31 to 0.93")
    drawn = [v for _, attrs in page.elements for name in ("d", "cx", "cy", "x1", "y1") if (v := attrs.get(name))]
    assert drawn and not any(bad in v for v in drawn for bad in ("nan", "inf"))


def test_a_gap_breaks_the_line(run: Path) -> None:
    lines(run / "metrics.jsonl", [step_record(s, odd=math.nan if s == 5 else float(s)) for s in range(1, 11)])
    paths = [path["d"] or "" for path in report(run).all("path")]
    assert any(path.count("M") == 2 for path in paths)


@pytest.mark.parametrize("value", [0.0, 7e-4, -3.0, 1e9, 1e-320])
def test_a_constant_metric_is_named_and_not_plotted(run: Path, value: float) -> None:
    lines(run / "metrics.jsonl", [step_record(s, same=value, optimizer_step=3 * s) for s in range(1, 11)])
    page = report(run)
    assert page.says(f"same {short(value, 4)}") and page.says("Constant so far:")
    assert not [svg for svg in page.all("svg") if (svg.get("aria-label") or "").startswith(("same", "optimizer_step"))]


def test_a_long_run_is_thinned_and_stays_small(run: Path) -> None:
    lines(run / "metrics.jsonl", [step_record(s, noise=float(np.sin(s * s))) for s in range(1, 4001)])
    page = report(run)
    longest = max((path["d"] or "").count("L") for path in page.all("path"))
    assert 200 < longest <= 450 and len(page.html) < 500_000


def test_large_images_are_made_small(run: Path) -> None:
    samples(run, 20, size=700)
    large = [image for image in report(run).all("img") if image["class"] == "photo"]
    assert len(large) == 2
    assert all(image["width"] == "256" and (image["src"] or "").startswith("data:image/jpeg") for image in large)


def test_scores_of_taste_are_shown_and_not_ticked(run: Path) -> None:
    for step in (0, 15, 30):
        path = run / "samples" / f"step-{step:06d}" / "index.json"
        path.write_text(json.dumps([{"file": "00.png", "prompt": "a cat", "tag": "", "score": 21.343, "note": ""}]))
    page = report(run)
    assert page.says("before 21.34")
    assert "✓" not in page.text and "✗" not in page.text


def test_an_old_report_survives_a_failing_write(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    old = write_report(run).read_text()
    lines(run / "evaluations.jsonl", [evaluation(0, 0.1), evaluation(30, 0.2)])

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(UserError, match="No space left"):
        write_report(run)
    assert (run / "report.html").read_text() == old
    assert not list(run.glob("*.tmp")) and not list(run.glob(".*.tmp"))


def test_the_same_run_gives_the_same_bytes(run: Path) -> None:
    assert write_report(run).read_bytes() == write_report(run).read_bytes()


def test_a_folder_that_is_not_there_is_not_made(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such folder"):
        write_report(tmp_path / "runs" / "typo")
    assert not (tmp_path / "runs").exists()


def axes(run: Path) -> list[dict[str, Any]]:
    found = [attrs["data-axes"] for attrs in report(run).all("div") if attrs.get("data-axes")]
    return json.loads(found[0] or "") if found else []


def test_curves_stand_on_rollouts_and_a_reader_can_choose_time_or_work(run: Path) -> None:
    lines(run / "metrics.jsonl", [step_record(s, seconds=s + 90.0 * (s > 20)) for s in range(1, 31)])
    lines(run / "evaluations.jsonl", [evaluation(0, 0.31, seconds=None), evaluation(30, 0.93, seconds=None)])
    rollouts, seconds, work = axes(run)
    assert [axis["name"] for axis in (rollouts, seconds, work)] == ["rollouts", "seconds of training", "thousand network evaluations"]
    assert rollouts["knots"][0] == [0, 0] and rollouts["knots"][-1] == [100, 100]
    # a stall of 90 s after rollout 20: two thirds of the rollouts took a sixth of the time and two thirds of the work
    assert dict(map(tuple, seconds["knots"]))[66.667] == pytest.approx(100 * 20 / 120, abs=0.01)
    assert dict(map(tuple, work["knots"]))[66.667] == pytest.approx(66.667, abs=0.01)


def test_without_clocks_there_is_nothing_to_choose(run: Path) -> None:
    lines(run / "metrics.jsonl", [step_record(step, seconds=None, network_evaluations=None) for step in range(1, 31)])
    lines(run / "evaluations.jsonl", [evaluation(0, 0.31, seconds=None), evaluation(30, 0.93, seconds=None)])
    assert axes(run) == []


def test_time_comes_in_the_unit_that_fits(run: Path) -> None:
    lines(run / "metrics.jsonl", [step_record(step, seconds=900.0 * step) for step in range(1, 31)])
    assert axes(run)[1]["name"] == "hours of training"
