"""What is told of an evaluation beside its page: the choice of images, the numbers, the table in a terminal."""

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from evaluations import NAN, write

from flowtilt.estimate import Estimate
from flowtilt.report.bars import scale_of
from flowtilt.report.evaluation.estimates import bracketed, decimals, verdict, written
from flowtilt.report.evaluation.extremes import ranked, worst_and_best
from flowtilt.report.evaluation.loading import ScoredImage, parse
from flowtilt.report.evaluation.terminal import table


@pytest.fixture
def two(tmp_path: Path) -> Path:
    """An evaluation of a tuned model and its base."""
    return write(tmp_path / "two", ("tuned", "base"))


@pytest.fixture
def one(tmp_path: Path) -> Path:
    """An evaluation of one model."""
    return write(tmp_path / "one", ("tuned",))


def results(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "results.json").read_text())


# which images ----------------------------------------------------------------------------------------


def image(index: int, copy: int, score: float | None, tag: str = "") -> ScoredImage:
    return ScoredImage("a", index, copy, f"prompt {index}", tag, "tuned", {"x": score}, "", None)


def test_equal_scores_take_turns_over_tags_and_prompts() -> None:
    """40 failures, 30 of them of one tag and 4 of each prompt: the 12 shown are of 12 prompts and of both tags alike while they last."""
    images = [image(i // 4, i % 4, 0.0, "many" if i < 32 else "few") for i in range(40)] + [image(99, 0, 1.0)]
    worst, best = worst_and_best(images, "x")
    assert len(worst) == 12 and [i.score("x") for i in best] == [1.0] + [0.0] * 11
    assert {i.tag for i in worst[:4]} == {"many", "few"} and len({i.index for i in worst[:10]}) == 10


@pytest.mark.parametrize("number", range(30))
def test_no_image_is_both_among_the_worst_and_the_best(number: int) -> None:
    scores = np.random.default_rng(number).permutation(number) / 10
    images = [image(i, 0, float(s)) for i, s in enumerate(scores)] + [image(999, 0, None)]
    worst, best = worst_and_best(images, "x")
    shown = [i.score("x") for i in worst + best]
    assert len(set(shown)) == len(shown) == min(24, number)
    assert [i.score("x") for i in worst] == sorted(scores)[: len(worst)]
    assert [i.score("x") for i in best] == sorted(scores, reverse=True)[: len(best)]


def test_images_that_all_score_alike_are_shown_once() -> None:
    worst, best = worst_and_best([image(i, 0, 1.0) for i in range(50)], "x")
    assert len(worst) == 12 and not best


def test_images_without_a_score_are_not_ranked() -> None:
    assert [i.index for i in ranked([image(0, 0, None), image(1, 0, 0.5), image(2, 0, NAN)], "x")] == [1]


# numbers ---------------------------------------------------------------------------------------------


def test_intervals_are_written_so_that_they_show() -> None:
    assert decimals([Estimate(0.942, 0.918, 0.963)]) == 3
    assert decimals([Estimate(0.28413, 0.2837, 0.2845)]) == 4
    assert decimals([Estimate(22.08, 22.05, 22.10)]) == 2
    assert decimals([Estimate(0.5, 0.5, 0.5), Estimate(NAN, NAN, NAN)]) == 3
    assert bracketed(Estimate(0.942, 0.918, 0.963), 3) == "[0.918, 0.963]"
    assert bracketed(Estimate(0.5, NAN, NAN), 3) == "[no interval]"
    assert bracketed(Estimate(1.0, 0.832, 1.0, "exact"), 3) == "[0.832, 1.000] exact"
    assert verdict(Estimate(0.0, kind="alike")).startswith("no interval: all prompts scored alike")
    assert verdict(Estimate(0.4, kind="few", prompts=2)) == "no interval: 2 prompts, at least 10 are needed"
    assert [written(v, 3, True) for v in (0.2, -0.2, -0.0001, 0.0001, NAN)] == ["+0.200", "-0.200", "0.000", "0.000", "-"]


@pytest.mark.parametrize(
    ("low", "high", "says"),
    [
        (0.01, 0.02, "higher: interval excludes 0"),
        (-0.02, -0.01, "lower: interval excludes 0"),
        (-0.01, 0.02, "may be chance: interval includes 0"),
        (0.0, 0.02, "may be chance: interval includes 0"),
        (NAN, NAN, "no interval: scores per prompt are not known"),
        (-0.02, 0.02, "no difference: interval includes 0"),
    ],
)
def test_the_verdict_is_the_intervals(low: float, high: float, says: str) -> None:
    assert verdict(Estimate((low + high) / 2 if low == low else 0.1, low, high)) == says


def test_an_edge_that_is_not_zero_is_not_written_as_zero() -> None:
    found = {"mean": 0.0011, "low": 0.00004, "high": 0.0022, "prompts": 10, "images": 20, "missing": 0, "wins": 0.6, "ties": 0.0}
    column = {
        "tuned": {"prompts": 10, "mean": 0.285, "low": 0.27, "high": 0.3},
        "base": {"prompts": 10, "mean": 0.284, "low": 0.27, "high": 0.3},
        "difference": found,
    }
    text = table({"variants": ["tuned", "base"], "sets": {"a": {"columns": {"clipscore": column}}}})
    assert "+0.00110 [+0.00004, +0.00220]" in text and "0.28500 [" not in text


def test_bars_begin_at_zero_and_close_values_are_dots_on_what_they_span() -> None:
    bars = scale_of([Estimate(0.2, 0.1, 0.3), Estimate(0.9, 0.8, 0.95)])
    assert (bars.low, bars.high, bars.dots) == (0.0, 1.0, False)
    dots = scale_of([Estimate(0.84, 0.83, 0.85), Estimate(0.88, 0.87, 0.89)])
    assert dots.dots and 0.8 < dots.low < 0.83 and 0.89 < dots.high < 0.9
    for scale in (bars, dots, scale_of([]), scale_of([Estimate(-2.0, -3.0, 1.0)]), scale_of([Estimate(0.0, 0.0, 0.0)])):
        assert scale.low < scale.high and scale.percent(scale.high) == pytest.approx(100)


# the terminal ----------------------------------------------------------------------------------------


def test_the_table_has_every_mean_with_its_interval(two: Path) -> None:
    text, found = table(results(two)), results(two)
    for name, one in found["sets"].items():
        assert f"{name} ({one['prompts']} prompts, {one['images']} images)" in text
        for column in one["columns"].values():
            for part in (column["tuned"], column["base"]):
                assert f"{part['mean']:.3f} [{part['low']:.3f}, {part['high']:.3f}]" in text
            assert f"{column['difference']['mean']:+.3f} [" in text
    assert re.search(r"geneval, mean over tags +0\.\d{3} \[", text) and re.search(r"pickscore/raw +0\.\d{3} .*what papers print", text)
    assert text.count("base: 2 of 72 missing") == 4 and "pairs: 2 of 72 missing" in text and "higher: interval excludes 0" in text
    assert "left out on drawbench: ocr: its prompts quote no text" in text


def test_the_tables_numbers_stand_below_each_other(two: Path) -> None:
    rows = [line for line in table(results(two)).splitlines() if "]" in line]
    means = [line for line in rows if "+" not in line]
    assert len({line.rindex("]") for line in means}) == 1 and len({line.index("]") for line in means}) == 1
    assert len({line.index("]") for line in rows if "+" in line}) == 1


def test_the_table_fits_110_columns_whatever_the_names_and_numbers(two: Path) -> None:
    found = results(two)
    geneval = found["sets"]["geneval"]["columns"]
    geneval["a_reward_with_a_name_that_goes_on_and_on/and_a_detail_of_it"] = geneval["geneval"]
    huge = {"mean": -98765.4321, "low": -98765.4512, "high": -98765.4012, "images": 10**9, "missing": 10**8}
    tags = {"mean_of_tags": huge, "by_tag": {"a": huge}}
    far = {"tuned": huge | {"low": -123456789.0}, "base": huge}
    long = {"tuned": huge | tags, "base": huge | tags, "difference": huge | {"wins": 1.0, "ties": 1.0}}
    geneval = {"geneval_" + "x" * 40: long, "far": far} | geneval
    found["sets"] = {"set " * 60: {"prompts": 10**7, "images": 10**9, "columns": geneval}} | found["sets"]
    found["left_out"] = [{"set": "a", "reward": "b", "why": "because " * 40}]
    text = table(found)
    assert max(map(len, text.splitlines())) <= 110
    assert "-98765.43 [-98765.45, -98765.40]" in text and "[-1.23e+08, -98765.40]" in text
    assert "..., mean over tags" in text and "100,000,000 of 1,000,000,000 missing" in text


def test_the_table_of_one_variant_has_no_differences(one: Path) -> None:
    text = table(results(one))
    assert "mean [95 %]" in text and "tuned" not in text and "base" not in text and "minus" not in text and "    2 of 72 missing" in text


def test_a_terminal_obeys_nothing_in_a_name() -> None:
    text = table({"sets": {"\x1b[31mred\u202e\nnext": {"columns": {"\x07bell": {"tuned": {"mean": 1.0}}}}}})
    assert all(letter.isprintable() or letter == "\n" for letter in text) and len(text.splitlines()) == 5
    assert "1.000 [no interval]" in text


def test_a_base_without_differences_has_no_table_of_them() -> None:
    text = table({"variants": ["tuned", "base"], "sets": {"a": {"columns": {"x": {"tuned": {"mean": 1.0}}}}}})
    assert "minus" not in text and "base" in text


@pytest.mark.parametrize("odd", [{}, {"sets": 3}, {"sets": {"a": {}}}, {"sets": {"a": {"columns": {"x": {}}}}}])
def test_the_table_of_nothing_is_a_table(odd: dict[str, Any]) -> None:
    assert table(odd) and parse(odd).variants == ["tuned"]


def test_no_torch_is_needed() -> None:
    code = "import sys, flowtilt.report.evaluation, flowtilt.report.evaluation.terminal; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
