# ruff: noqa: F811 - pytest gives the fixture by its name
"""The run page says the same intervals as the evaluation page: by prompt, in every place, and why where there is none."""

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from test_report import Page, evaluation, image_scores, lines, report, run  # noqa: F401 - run is a fixture

from flowtilt.estimate import FEW, UNKNOWN
from flowtilt.evaluate.results import results_of
from flowtilt.report.image_scores import change, estimate_of, score_summary, tag_estimates


def compared(run: Path, before: list[float | None], after: list[float | None], copies: int = 2, column: str = "playground_strict") -> Page:
    """A run whose first and last evaluation had these images' scores."""
    for step, scores in ((0, before), (30, after)):
        image_scores(run, step, scores, copies, column)
    records = []
    for step, scores in ((0, before), (30, after)):
        content = json.loads((run / "samples" / f"step-{step:06d}" / "scores.json").read_text())
        estimate = score_summary(content)
        records.append(evaluation(step, estimate["mean"], column=column, estimate=estimate, images=len(scores)))
    lines(run / "evaluations.jsonl", records)
    return report(run)


def test_a_change_is_judged_pair_by_pair(run: Path) -> None:
    """Each prompt gains .02 around levels that differ by far more: of single scores the intervals overlap, of the change it is sure."""
    levels = np.random.default_rng(0).uniform(0, 0.9, 80).round(3)
    page = compared(run, list(levels), list((levels + 0.02 + np.random.default_rng(1).normal(0, 0.01, 80)).round(3)), column="mine")
    assert re.search(r"The change, prompt by prompt, is \+0\.0(19|20|21)", page.text) and "chance" not in page.text


def test_a_change_within_its_interval_may_be_chance(run: Path) -> None:
    before, after = (list(np.random.default_rng(seed).uniform(0, 1, 60).round(3)) for seed in (0, 1))
    assert compared(run, before, after, column="mine").says("it may be chance, as the interval includes 0.")


def test_an_equal_score_is_not_called_chance(run: Path) -> None:
    page = compared(run, [0.5] * 40, [0.5] * 40, column="mine")
    assert page.says("The score did not change.") and "chance" not in page.text
    scores = [0.0, 1.0] * 20
    page = compared(run, scores, scores)
    assert page.says("the held-out score stayed at 0.50") and "chance" not in page.text


@pytest.mark.parametrize(("prompts", "shown"), [(2, False), (9, False), (10, True)])
def test_below_ten_prompts_there_is_no_interval_and_the_page_says_why(run: Path, prompts: int, shown: bool) -> None:
    rng = np.random.default_rng(prompts)
    before = rng.uniform(0, 0.3, 4 * prompts).round(3)
    page = compared(run, list(before), list(before + 0.5), copies=4, column="mine")
    assert ("95% interval 0." in " ".join(page.text.split())) == shown
    assert page.says(f"no interval: {prompts} prompts, at least 10 are needed") == (not shown)
    assert page.says(f"It has no interval ({prompts} prompts, at least 10 are needed)") == (not shown)
    assert bool([path for path in page.all("path") if path.get("class") == "band"]) == shown


def test_a_run_of_an_earlier_version_has_no_interval_and_says_why(run: Path) -> None:
    records = [{key: value for key, value in evaluation(step, score).items() if key != "estimate"} for step, score in ((0, 0.3), (30, 0.9))]
    lines(run / "evaluations.jsonl", records)
    page = report(run)
    assert page.says("no interval: scores per prompt are not known") and page.says("The change is +0.60. It has no interval")
    assert not [path for path in page.all("path") if path.get("class") == "band"]


def test_where_all_prompts_are_right_the_exact_bound_stands_in_by_name(run: Path) -> None:
    page = compared(run, [0.0] * 40, [1.0] * 40)
    assert page.says("exact 95% bound over prompts 0.83 to 1.00") and page.says("exact 95% bound over prompts 0.00 to 0.17")


def test_the_run_page_and_the_evaluation_page_say_the_same_numbers() -> None:
    """To the last bit, whatever the order of the images."""
    rng = np.random.default_rng(3)
    records = [
        {"set": "s", "index": k // 3, "copy": k % 3, "tag": "ab"[k // 3 % 2], "variant": v, "scores": {"mine": float(rng.normal())}}
        for k in range(90)
        for v in ("tuned", "base")
    ]
    column = results_of(records, ("tuned", "base"), {}, {})["sets"]["s"]["columns"]["mine"]
    kept = {}
    for variant in ("tuned", "base"):
        rows = [r for r in records if r["variant"] == variant]
        rows = [rows[place] for place in np.random.default_rng(4).permutation(90)]
        lists = {"prompt": [r["index"] for r in rows], "tag": [r["tag"] for r in rows], "score": [r["scores"]["mine"] for r in rows]}
        kept[variant] = {"column": "mine", "captions": "same", **lists}
        assert score_summary(kept[variant]) == column[variant]
    found = change(kept["base"], kept["tuned"])
    assert (found.value, found.low, found.high) == tuple(column["difference"][key] for key in ("mean", "low", "high"))


def two_tags(scores: list[float], prompts: int, **more: Any) -> dict[str, Any]:
    """A logged evaluation of two tags with so many prompts each, an image per prompt."""
    tags = ["position"] * prompts + ["color"] * prompts
    images = {"column": "mine", "captions": "same", "prompt": list(range(2 * prompts)), "tag": tags, "score": scores, **more}
    summary = score_summary(images)
    by_tag = {tag: summary["by_tag"][tag]["mean"] for tag in ("position", "color")}
    return {"rollout": 0, "score": summary["mean"], "estimate": summary, "by_tag": by_tag, "images": 2 * prompts, "seconds": 0.0}


def test_tags_have_the_intervals_of_the_evaluation_page(run: Path) -> None:
    scores = np.random.default_rng(0).uniform(size=40).tolist()
    record = two_tags(scores, 20)
    rows = [
        {"set": "s", "index": k, "copy": 0, "tag": "position" if k < 20 else "color", "variant": "tuned", "scores": {"mine": score}}
        for k, score in enumerate(scores)
    ]
    page_of = results_of(rows, ("tuned",), {}, {})["sets"]["s"]["columns"]["mine"]["tuned"]["by_tag"]
    found = tag_estimates(record)
    assert found == {tag: estimate_of(value) for tag, value in page_of.items()} and all(e.has_interval for e in found.values())
    lines(run / "evaluations.jsonl", [record, {**record, "rollout": 30}])
    page = report(run)
    assert len([line for line in page.all("line") if line.get("class") == "whisker"]) == 4  # two tags, before and after
    assert all(page.says(f"[{e.low:.2f}, {e.high:.2f}]") for e in found.values())


def test_a_tag_of_few_prompts_has_no_interval_and_the_page_says_why(run: Path) -> None:
    record = two_tags(np.random.default_rng(0).uniform(size=18).tolist(), 9)
    assert {e.kind for e in tag_estimates(record).values()} == {FEW}
    lines(run / "evaluations.jsonl", [record, {**record, "rollout": 30}])
    page = report(run)
    assert not [line for line in page.all("line") if line.get("class") == "whisker"]
    assert page.says("No interval where a kind has fewer than 10 prompts.")


def test_tags_of_version_0_1_0_are_shown_without_an_interval() -> None:
    (found,) = tag_estimates({"rollout": 0, "score": 0.5, "by_tag": {"counting": 0.25, "odd": None}}).values()
    assert found.value == 0.25 and found.kind == UNKNOWN and not found.has_interval


def test_a_users_score_has_the_bound_of_the_range_that_it_says() -> None:
    right = two_tags([1.0] * 40, 20, range=[0, 1])
    assert right["estimate"]["interval"] == "exact" and tag_estimates(right)["color"].high == 1
    assert two_tags([1.0] * 40, 20, range=[])["estimate"]["interval"] == "alike"
    assert two_tags([1.0] * 40, 20, range=[0, 0.5])["estimate"]["interval"] == "alike"  # it says what is not so


def test_a_continuous_reward_without_a_range_never_has_an_exact_bound() -> None:
    kinds = {estimate.kind for estimate in tag_estimates(two_tags([0.3] * 40, 20, column="hpsv2")).values()}
    assert "exact" not in kinds
