"""An evaluation's table from its images."""

import pytest

from flowtilt.evaluate.results import results_of
from flowtilt.rewards.about import built_in


def records(column, *scores):
    return [
        {"set": "s", "index": k, "copy": 0, "tag": "", "variant": variant, "scores": {column: value}}
        for variant in ("tuned", "base")
        for k, value in enumerate(scores)
    ]


def column_of(column, *scores):
    ranges = built_in()[column.partition("/")[0]].ranges(column.partition("/")[0]) if column != "mine" else {}
    return results_of(records(column, *scores), ("tuned", "base"), {}, ranges)["sets"]["s"]["columns"][column]


@pytest.mark.parametrize("column", ["playground_strict", "geneval/correct", "ocr"])
def test_twenty_right_of_twenty_are_not_certain(column):
    found = column_of(column, *[1.0] * 20)
    assert (found["tuned"]["low"], found["tuned"]["high"]) == (pytest.approx(0.8316, abs=1e-4), 1.0)
    assert found["difference"]["low"] == pytest.approx(-0.1684, abs=1e-4)


@pytest.mark.parametrize(("column", "scores"), [("mine", [1.0] * 20), ("unifiedreward/points", [1.0] * 20), ("geneval", [-0.5] * 20)])
def test_where_the_range_is_not_known_or_left_there_is_no_interval(column, scores):
    found = column_of(column, *scores)
    assert found["tuned"]["low"] is None and found["tuned"]["interval"] == "alike" and found["difference"]["low"] is None


def test_missing_scores_do_not_hide_the_range():
    assert column_of("ocr", None, *[0.0] * 20)["base"]["high"] == pytest.approx(0.1684, abs=1e-4)
