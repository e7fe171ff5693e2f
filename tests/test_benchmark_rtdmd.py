"""RTDMD over seeds: a page that is never out of date, stages at equal compute, and a picture of what was drawn."""

import json
from pathlib import Path

import rtdmd
import torch
from contest.rtdmd_page import GAP, HEAD, MARGIN, SHOWN, TILE, _sheet, with_table

from flowtilt import load_recipe
from flowtilt.plan.passes import passes_in_all, passes_of

ROOT = Path(__file__).parents[1]


def test_the_page_is_what_the_results_say():
    told, results = rtdmd.PAGE.read_text(encoding="utf-8"), json.loads(rtdmd.RESULTS.read_text())
    assert with_table(told, results) == told and with_table(told, None) != told


def test_every_figure_is_kept_with_its_seed_command_and_machine():
    results = json.loads(rtdmd.RESULTS.read_text())
    assert {entry["method"] for entry in results["entries"]} <= {"cold", *rtdmd.SECOND}
    for entry in results["entries"]:
        assert {"seed", "command", "machine", "commit", "final_score", "held_out", "network_evaluations"} <= entry.keys()
        if entry["method"] in rtdmd.SECOND:
            rollout = passes_of(load_recipe(rtdmd.SECOND[entry["method"]]), 5).evaluations
            assert results["budget"] - rollout < entry["network_evaluations"] <= results["budget"]


def test_what_goes_on_from_a_student_goes_on_from_its_own_seeds(tmp_path):
    student = rtdmd.cold(tmp_path, 1)
    assert student.budget == passes_in_all(load_recipe("playground-rtdmd-cold")).evaluations
    for name in rtdmd.SECOND:
        recipe = rtdmd.second(tmp_path, name, 1).load()
        assert (recipe.seed, list(recipe.lora.on), recipe.evaluate) == (
            1,
            [str(student.folder)],
            student.load().evaluate.model_copy(update={"every": 20}),
        )


def test_a_picture_is_framed_where_the_verifier_agrees():
    images, step = torch.full((SHOWN, 3, 32, 32), 0.5), TILE + 2 * GAP
    sheet = _sheet(["a circle"] * SHOWN, [("teacher, 20 steps", images)], [torch.tensor([1.0] + [0.0] * (SHOWN - 1))])
    right, wrong = (sheet.getpixel((MARGIN + k * step + GAP // 2 + 1, HEAD + step // 2)) for k in range(2))
    assert right != wrong and sheet.getpixel((MARGIN + step // 2, HEAD + step // 2)) == (128, 128, 128)
