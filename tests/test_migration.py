"""What earlier versions wrote: run folders of 0.1.0, keys of other names, files of a later version.

tests/data/run-0.1.0 is the folder of a run of three rollouts, as flowtilt 0.1.0 wrote it, with its first checkpoint.
"""

import json
import shutil
from pathlib import Path

import pytest

from flowtilt import Trainer, UserError
from flowtilt.config import load_recipe, to_toml, version
from flowtilt.io.files import read_lines
from flowtilt.io.run_folder import RunFolder
from flowtilt.report.loading import load
from flowtilt.runs import checkpoint
from flowtilt.runs.folder import open_run

WRITTEN = Path(__file__).parent / "data" / "run-0.1.0"


@pytest.fixture
def old(tmp_path):
    return shutil.copytree(WRITTEN, tmp_path / "run")


def test_a_run_of_0_1_0_is_read_and_goes_on_as_it_went_on_then(old):
    then = read_lines(old / "metrics.jsonl")
    assert json.loads((RunFolder(old).checkpoint(1).state).read_text())["format"] == checkpoint.OLDEST
    assert len(load(old).metrics) == 3
    Trainer(open_run(old, []), resume=old).run()
    now = read_lines(old / "metrics.jsonl")
    assert now[0] == then[0] and [line["rollout"] for line in now] == [1, 2, 3]
    for name in ("reward/total", "loss", "deviation", "grad_norm", "network_evaluations"):
        # velocities differ by 1e-4 here, and processors in their seventh digit: a thousandth of that
        rel = 1e-3 if name == "deviation" else 1e-4
        assert [line[name] for line in now] == pytest.approx([line[name] for line in then], rel=rel), name
    assert RunFolder(old).recipe.read_text().startswith(f"version = {version.VERSION}\n")
    assert load_recipe(RunFolder(old).recipe) == load_recipe(WRITTEN / "recipe.toml").model_copy(update={"run": None})


@pytest.mark.parametrize(("number", "said"), [(5, "of a later flowtilt"), (2, "before 0.1.0")])
def test_a_checkpoint_of_another_version_is_named_and_left_where_it_is(old, number, said):
    place = RunFolder(old).checkpoint(1).state
    place.write_text(place.read_text().replace('"format": 3', f'"format": {number}'))
    before = place.read_bytes()
    with pytest.raises(UserError, match=said):
        Trainer(open_run(old, []), resume=old)
    assert place.read_bytes() == before


def test_a_run_of_0_1_0_is_read_without_a_hint_and_a_recipe_of_ones_own_with_one(capsys, tmp_path):
    assert load_recipe(WRITTEN / "recipe.toml", stored=True).rollouts == 3
    assert capsys.readouterr().err == ""
    (tmp_path / "mine.toml").write_text('base = "playground"\nsteps = 7\n')
    assert load_recipe(tmp_path / "mine.toml").rollouts == 7
    assert "the key 'steps' is called 'rollouts'" in capsys.readouterr().err
    assert open_run(WRITTEN, ["steps=9"]).rollouts == 9  # what a 0.1.0 run was lengthened by


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("version = 3\n", "is of version 3, this flowtilt reads up to 2; upgrade it"),
        ("version = 0\n", "must be a whole number from 1"),
        ('version = "1"\n', "must be a whole number from 1"),
    ],
)
def test_a_recipe_of_a_later_version_is_refused(tmp_path, text, said):
    (tmp_path / "mine.toml").write_text('base = "playground"\n' + text)
    with pytest.raises(UserError, match=said):
        load_recipe(tmp_path / "mine.toml")


def test_a_recipe_says_its_version_and_is_read_back_equal(tmp_path):
    recipe = load_recipe("playground")
    (tmp_path / "mine.toml").write_text(to_toml(recipe))
    assert load_recipe(tmp_path / "mine.toml") == recipe and f"version = {version.VERSION}" in to_toml(recipe)
