"""Who holds a folder, where locks don't say it, and paths that no file system takes."""

import json
import threading
import time

import pytest

from flowtilt import UserError
from flowtilt.cli import main
from flowtilt.io import locks
from flowtilt.io.locks import HOLDER, Hold


def test_a_note_of_another_machine_counts_while_somebody_touches_it(tmp_path, monkeypatch):
    """As on a shared file system whose locks other machines don't see."""
    monkeypatch.setattr(locks, "BEAT", 0.05)
    monkeypatch.setattr(locks, "WATCH", 0.5)
    note = tmp_path / HOLDER
    note.write_text(json.dumps({"pid": 1, "host": "elsewhere", "what": "a training run", "beats": 5.0}))
    stopped = threading.Event()
    other = threading.Thread(target=locks._beat, args=(note, stopped))
    other.start()
    with pytest.raises(UserError, match="held by a training run, process 1 on elsewhere"):
        Hold(tmp_path, "a training run")
    stopped.set()
    other.join()
    Hold(tmp_path, "a training run").release()  # what a kill has left
    assert not note.exists()


def test_a_holder_touches_its_note(tmp_path, monkeypatch):
    monkeypatch.setattr(locks, "BEAT", 0.02)
    hold = Hold(tmp_path, "a training run")
    before = (tmp_path / HOLDER).stat().st_mtime_ns
    time.sleep(0.3)
    assert (tmp_path / HOLDER).stat().st_mtime_ns > before
    hold.release()


@pytest.mark.parametrize("words", [["train", "playground", "run={}"], ["train", "--resume", "{}"], ["init", "{}.toml"]])
def test_a_name_that_is_too_long_is_one_line(tmp_path, monkeypatch, capsys, words):
    monkeypatch.chdir(tmp_path)
    assert main([word.format("r" * 300) for word in words]) == 2
    assert capsys.readouterr().err.count("\n") == 1 and not list(tmp_path.iterdir())
