"""One type knows every file of a run, and the lock says whether somebody writes there."""

import json
import os
import re
import socket
import subprocess
import sys
from pathlib import Path

import pytest

import flowtilt
from flowtilt.io.locks import HOLDER, Hold, is_held
from flowtilt.io.run_folder import CheckpointFolder, EvaluationFolder, RunFolder, SamplesFolder, step_name, step_of


def test_on_the_class_a_file_is_its_name_and_on_a_folder_its_path(tmp_path):
    assert RunFolder.metrics == "metrics.jsonl" and RunFolder(tmp_path).metrics == tmp_path / "metrics.jsonl"
    assert RunFolder(tmp_path).checkpoint(3).state == tmp_path / "checkpoints" / "step-000003" / "state.json"
    assert RunFolder(tmp_path).samples_at(3).scores == tmp_path / "samples" / "step-000003" / "scores.json"


def test_a_checkpoint_knows_its_run(tmp_path):
    inside = RunFolder(tmp_path).checkpoint(1).path
    assert RunFolder.around(inside) is None
    RunFolder(tmp_path).recipe.write_text("")
    around = RunFolder.around(inside)
    assert around is not None and around.path == tmp_path.resolve()


@pytest.mark.parametrize("step", [0, 1, 999_999, 1_000_000])
def test_a_steps_folder_is_read_back(step):
    assert step_of(step_name(step)) == step


@pytest.mark.parametrize("name", ["step-1", "step-0000001", "step-", "step-00000a", "step-000001.damaged", "mine"])
def test_other_folders_are_the_users(name):
    assert step_of(name) is None


def test_no_other_file_names_a_file_of_a_run():
    known = {vars(value)["name"] for kind in (RunFolder, CheckpointFolder, EvaluationFolder, SamplesFolder) for value in vars(kind).values()
             if type(value).__name__ == "_Named"}  # fmt: skip
    files = "|".join(re.escape(name) for name in known if "." in name)
    quoted = re.compile(rf"""["']({files})["']""")
    source = Path(flowtilt.__file__).parent
    assert not [f"{f.name}: {found}" for f in source.rglob("*.py") if f.name != "run_folder.py" for found in quoted.findall(f.read_text())]


# who writes there ---------------------------------------------------------------------------------------


def test_a_folder_is_held_until_it_is_released(tmp_path):
    assert not is_held(tmp_path) and not list(tmp_path.iterdir())
    hold = Hold(tmp_path, "a training run")
    assert is_held(tmp_path) and is_held(tmp_path)
    hold.release()
    assert not is_held(tmp_path)
    Hold(tmp_path, "another").release()  # asking has not kept it


def test_what_a_killed_process_left_holds_nothing(tmp_path):
    code = f"import os; from pathlib import Path; from flowtilt.io.locks import Hold; h = Hold(Path({str(tmp_path)!r}), 'x'); os._exit(9)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 9
    assert (tmp_path / HOLDER).is_file() and not is_held(tmp_path)


def test_without_locks_the_note_is_believed_while_its_process_lives(tmp_path, monkeypatch):
    from filelock import FileLock

    def refuse(*_, **__):
        raise OSError(38, "no locks")

    monkeypatch.setattr(FileLock, "acquire", refuse)
    for pid, held in ((os.getpid(), True), (2**22 + 1, False)):
        (tmp_path / HOLDER).write_text(json.dumps({"pid": pid, "host": socket.gethostname()}))
        assert is_held(tmp_path) == held
