"""Results of the community: a submission is made from a run, and what is wrong with one is said."""

import importlib.util
import json
from pathlib import Path

import pytest

PLACE = Path(__file__).parent.parent / "community"
spec = importlib.util.spec_from_file_location("submission", PLACE / "submission.py")
assert spec and spec.loader
submission = importlib.util.module_from_spec(spec)
spec.loader.exec_module(submission)


@pytest.fixture
def made(finished, tmp_path):
    submission.make(finished, tmp_path / "mine")
    (tmp_path / "mine" / "README.md").write_text("What it shows.\n")
    return tmp_path / "mine"


def test_a_submission_of_a_run_is_whole_and_has_no_path_of_its_machine(made, finished):
    assert submission.faults(made) == []
    assert str(finished.parent) not in (made / "recipe.toml").read_text()
    told = json.loads((made / "digest.json").read_text())
    assert told["rollouts"] == 4 and set(told["weights"]) == {"pytorch_lora_weights.safetensors"} and told["network_evaluations"] > 0


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda place: (place / "README.md").unlink(), "no README.md"),
        (lambda place: (place / "run.sh").write_text("rm"), "run.sh: no file of a submission"),
        (lambda place: (place / "report.html").write_bytes(b"x" * (submission.LARGEST + 1)), "at most"),
        (lambda place: raised(place), "digest.json: score is"),
        (lambda place: (place / "report.html").write_text('<img src="https://elsewhere">'), "loads something from elsewhere"),
        (lambda place: (place / "recipe.toml").write_text("version = 99\n"), "is of version 99"),
        (lambda place: (place / "digest.json").write_text("{"), "Expecting"),
    ],
)
def test_what_is_wrong_is_said(made, change, said):
    change(made)
    assert any(said in one for one in submission.faults(made))


def raised(place):
    told = json.loads((place / "digest.json").read_text())
    told["score"]["after"] += 0.1
    (place / "digest.json").write_text(json.dumps(told))


def test_every_submission_of_this_repository_passes():
    for folder in PLACE.iterdir():
        if folder.is_dir() and folder.name != "__pycache__":
            assert submission.faults(folder) == [], folder
