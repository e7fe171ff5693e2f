"""A run knows what it was made of: from whichever folder it is resumed, and whatever was edited or moved meanwhile."""

import json
import os
import shutil
from pathlib import Path

import pytest
from conftest import quick

from flowtilt import Trainer, UserError
from flowtilt.build import inputs
from flowtilt.cli import main
from flowtilt.config import load_recipe
from flowtilt.io.files import read_lines
from flowtilt.lora.find import find
from flowtilt.runs import folder as runs

REWARD = "import helper\n\ndef f(images, prompts):\n    return helper.mean(images)\n"


@pytest.fixture
def project(tmp_path, monkeypatch):
    """A working folder with prompts, a reward of two files, and a small model's folder."""
    folder = tmp_path / "project"
    (folder / "model" / "transformer").mkdir(parents=True)
    (folder / "model" / "model_index.json").write_text("{}")
    (folder / "model" / "transformer" / "weights.safetensors").write_bytes(b"\1" * 3_000_000)
    (folder / "p.txt").write_text("a red circle\na blue square\na green cross\n")
    (folder / "test.txt").write_text("a yellow circle\n")
    (folder / "mine.py").write_text(REWARD)
    (folder / "helper.py").write_text("def mean(images):\n    return images.mean((1, 2, 3))\n")
    monkeypatch.chdir(folder)
    return folder


NAMES = ["prompts=p.txt", "evaluate.prompts=./test.txt", "model=model", "rewards.mine=mine.py:f", "rewards.playground=0"]


def recipe(*overrides):
    return load_recipe("playground", [*NAMES, "run=run", *overrides])


def begun(project: Path) -> Path:
    """A run of `recipe`, as far as this module looks at one."""
    from flowtilt.rewards import load_reward

    load_reward("mine", "mine.py:f")
    hold = runs.create(inputs.whole(recipe()))
    inputs.save(inputs.whole(recipe()), hold.folder, None, [])
    hold.release()
    return project / "run"


def test_a_runs_recipe_names_files_by_whole_paths_and_nothing_else_by_any(project, tmp_path, monkeypatch):
    folder = begun(project)
    monkeypatch.chdir(tmp_path)
    kept = load_recipe(folder / "recipe.toml")
    assert (kept.prompts, kept.evaluate.prompts, kept.model.path) == tuple(str(project / name) for name in ("p.txt", "test.txt", "model"))
    plain = load_recipe("sd35m-geneval")
    assert inputs.whole(plain) == plain
    served = load_recipe("playground", ["rewards.far=http://host:1", 'lora.init="/no/where@64"', "prompts=ocr-train"])
    assert inputs.whole(served) == served


def test_the_same_files_from_another_folder_are_no_change(project, tmp_path, monkeypatch):
    folder = begun(project)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "p.txt").write_text("another file of this name\n")
    found = runs.open_run(folder, [])
    assert found.prompts == str(project / "p.txt") and inputs.changes(found, folder, begun=True) == []


@pytest.mark.parametrize(
    ("file", "said"),
    [
        ("p.txt", "prompts"),
        ("test.txt", r"evaluate\.prompts"),
        ("mine.py", r"rewards\.mine"),
        ("helper.py", "import"),
        ("model/model_index.json", "model"),
        ("model/transformer/weights.safetensors", "model"),
    ],
)
@pytest.mark.parametrize("how", ["edited", "deleted"])
def test_whatever_was_edited_is_named(project, file, said, how):
    folder = begun(project)
    data = bytearray((project / file).read_bytes())
    data[-1] ^= 1
    (project / file).write_bytes(data) if how == "edited" else (project / file).unlink()
    with pytest.raises(UserError, match=rf"{said} .*(has changed|is gone) since the run began.*--changed") as caught:
        inputs.check(runs.open_run(folder, []), folder, begun=True)
    assert "\n" not in str(caught.value)


def test_a_source_image_that_was_replaced_is_named_as_long_as_a_prompt_names_it(project, tmp_path):
    (project / "p.jsonl").write_text('{"prompt": "brighter", "image": "in/a.png"}\n{"prompt": "darker", "image": "in/b.png"}\n')
    (project / "in").mkdir()
    for name in "ab":
        (project / "in" / f"{name}.png").write_bytes(name.encode() * 3_000_000)
    edits = inputs.whole(recipe("evaluate.prompts=./p.jsonl"))
    hold = runs.create(edits)
    inputs.save(edits, hold.folder, None, [])
    hold.release()
    moved = tmp_path / "elsewhere"
    shutil.move(project, moved)
    run, image = moved / "run", moved / "in" / "b.png"
    inputs.check(runs.open_run(run, []), run, begun=True)
    for change, said in ((lambda: image.write_bytes(b"b" * 2_999_999 + b"c"), "has changed"), (image.unlink, "is gone")):
        change()
        with pytest.raises(UserError, match=rf"source image .*b\.png {said} since the run began"):
            inputs.check(runs.open_run(run, []), run, begun=True)
    inputs.check(runs.open_run(run, [f"evaluate.prompts={moved / 'test.txt'}"]), run, begun=True)


def test_what_a_model_folder_holds_besides_the_model_may_change(project):
    folder = begun(project)
    (project / "model" / "README.md").write_text("new")
    (project / "model" / ".cache").mkdir()
    (project / "model" / ".cache" / "x.json").write_text("{}")
    inputs.check(runs.open_run(folder, []), folder, begun=True)


def test_an_override_that_names_another_file_is_no_change(project):
    folder = begun(project)
    (project / "test.txt").write_text("edited\n")
    (project / "other.txt").write_text("a blue circle\n")
    found = runs.open_run(folder, ["evaluate.prompts=./other.txt"])
    assert found.evaluate.prompts == str(project / "other.txt")
    inputs.check(found, folder, begun=True)


def test_a_run_and_its_files_can_be_moved_together_but_only_unchanged(project, tmp_path):
    begun(project)
    moved = tmp_path / "elsewhere"
    shutil.move(project, moved)
    found = runs.open_run(moved / "run", [])
    assert found.prompts == str(moved / "p.txt") and found.model.path == str(moved / "model")
    assert found.rewards["mine"] == f"{moved / 'mine.py'}:f"
    inputs.check(found, moved / "run", begun=True)
    (moved / "p.txt").write_text("edited\n" * 3)
    with pytest.raises(UserError, match=r"prompts .*is gone"):
        inputs.check(runs.open_run(moved / "run", []), moved / "run", begun=True)


def test_a_run_of_an_earlier_version_goes_on(project):
    folder = begun(project)
    (folder / "sources.json").unlink()
    inputs.check(runs.open_run(folder, []), folder, begun=True)
    (folder / "sources.json").write_text('{"files": [3]}')
    with pytest.warns(UserWarning, match=r"sources\.json: damaged"):
        inputs.check(runs.open_run(folder, []), folder, begun=True)


def test_a_resumed_run_needs_leave_to_go_on_with_other_prompts(tmp_path, monkeypatch, capsys, finished):
    """End to end, with the LoRA that it began with gone by then."""
    for name, color in (("one", "red"), ("two", "blue")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "p.txt").write_text("".join(f"a {color} {shape}\n" for shape in ("circle", "square", "cross")))
    monkeypatch.chdir(tmp_path / "one")
    shutil.copytree(finished / "lora", tmp_path / "lora")
    files = ["prompts=p.txt", "evaluate.prompts=p.txt", f"lora.init={tmp_path / 'lora'}", "evaluate.every=0"]
    Trainer(quick(tmp_path / "run", "rollouts=1", *files)).run()
    shutil.rmtree(tmp_path / "lora")
    monkeypatch.chdir(tmp_path / "two")
    (tmp_path / "one" / "p.txt").write_text("a green circle\na green square\na green cross\n")
    capsys.readouterr()
    assert main(["train", "--resume", str(tmp_path / "run"), "rollouts=2"]) == 2
    said = capsys.readouterr().err
    assert "prompts" in said and "has changed" in said and said.count("\n") == 1
    assert main(["train", "--resume", str(tmp_path / "run"), "rollouts=2", "--changed"]) == 0
    kept = json.loads((tmp_path / "run" / "sources.json").read_text())
    assert kept["changed"][0]["step"] == 1 and len(kept["changed"][0]["what"]) == 2
    assert len(read_lines(tmp_path / "run" / "metrics.jsonl")) == 2
    trainer = Trainer(runs.open_run(tmp_path / "run", ["rollouts=3"]), resume=tmp_path / "run")
    assert {prompt.text for prompt in trainer.prompts} == {"a green circle", "a green square", "a green cross"}
    trainer.close()


def test_a_lora_is_known_by_its_weights(finished, tmp_path):
    folder = shutil.copytree(finished / "lora", tmp_path / "lora")
    named = quick(tmp_path / "run", f"lora.init={folder}")
    hold = runs.create(named)
    inputs.save(named, hold.folder, None, [])
    hold.release()
    weights = find(folder).weights
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    os.unlink(weights)
    weights.write_bytes(data)
    assert inputs.changes(named, tmp_path / "run", begun=True) == []
    assert len(inputs.changes(named, tmp_path / "run", begun=False)) == 1


def test_what_ranks_compare_of_files_is_their_content(tmp_path):
    """On another machine the same path may be another file."""
    for name in ("p.txt", "mine.py"):
        (tmp_path / name).write_text("a red circle\n")
    recipe = inputs.whole(load_recipe("playground", [f"prompts={tmp_path}/p.txt", f"rewards.mine={tmp_path}/mine.py:f"]))
    before = inputs.contents(recipe)
    (tmp_path / "mine.py").write_text("a red square\n")
    after = inputs.contents(recipe)
    assert {name for name in before | after if before.get(name) != after.get(name)} == {"the content of rewards.mine"}
    assert before["the content of prompts"] and len(before) == 2
