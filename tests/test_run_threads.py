"""Threads of a run on a CPU: what other programs leave free when it begins, and the same number when it goes on."""

import json
import os

import pytest
import torch
from conftest import quick
from test_resume import contents

from flowtilt import Trainer
from flowtilt.io.processors import Others
from flowtilt.runs.folder import open_run
from flowtilt.training.threads import CHOICES, Threads, fitting


@pytest.fixture
def two_threads(monkeypatch):
    """Two, as torch chose them; returns what sets how many processors are free."""
    for name in CHOICES:
        monkeypatch.delenv(name, raising=False)
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield lambda free: monkeypatch.setattr(Others, "free", lambda self: (free, 2))
    torch.set_num_threads(before)


def test_what_is_free_is_between_none_and_all():
    free, processors = Others().free()
    assert 0 <= free <= processors <= os.cpu_count()
    assert [fitting(free, 2) for free in (0.0, 0.7, 1.4, 1.5, 2.0)] == [1, 1, 1, 2, 2]
    assert [fitting(free, 8) for free in (5.3, 7.6, 16.0)] == [5, 8, 8]


def test_a_busy_machine_gets_one_thread_and_who_has_chosen_is_told(two_threads, monkeypatch):
    two_threads(1.9)
    assert Threads().choose(None) is None and torch.get_num_threads() == 2
    two_threads(0.3)
    threads = Threads()
    assert "threads: 1, since other programs leave about 0.3 of 2" in threads.choose(None) and torch.get_num_threads() == 1
    threads.back()
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    assert "by the environment" in Threads().choose(None) and torch.get_num_threads() == 2
    assert "this run began with 1" in Threads().choose(1) and torch.get_num_threads() == 2


def test_a_run_goes_on_with_the_threads_that_it_began_with(two_threads, tmp_path, capsys):
    two_threads(0.3)
    Trainer(quick(tmp_path / "straight")).run()
    assert json.loads((tmp_path / "straight" / "environment.json").read_text())["threads"] == 1
    assert torch.get_num_threads() == 2, "the process has back what it had"
    trainer = Trainer(quick(tmp_path / "stopped"))
    trainer.rollout()
    trainer.close()
    two_threads(2.0)
    capsys.readouterr()
    resumed = Trainer(open_run(tmp_path / "stopped", []), resume=tmp_path / "stopped")
    assert torch.get_num_threads() == 1 and "threads: 1, as this run began" in capsys.readouterr().err
    resumed.run()
    assert contents(tmp_path / "stopped") == contents(tmp_path / "straight")
    assert json.loads((tmp_path / "stopped" / "environment.json").read_text())["threads"] == 1
