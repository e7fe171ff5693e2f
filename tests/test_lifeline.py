"""One rank fails: all end within seconds, one of them says why, and torchrun's restart goes on from the checkpoint."""

import time

import pytest
from conftest import QUICK
from ranks import together

from flowtilt.cli import main

REWARD = """
import os, time
from pathlib import Path

calls = 0

def f(images, prompts):
    global calls
    calls += 1
    if os.environ["RANK"] == "1" and calls == 2:
        {what}
    return images.mean((1, 2, 3))
"""


def fails(tmp_path, what, size=2, **environment):
    (tmp_path / "mine.py").write_text(REWARD.format(what=what))
    words = ["train", "playground", *QUICK, f"run={tmp_path}/run", f"rewards.mine={tmp_path}/mine.py:f", 'evaluate.rewards=["playground"]']
    begin = time.monotonic()
    done = together(size, main, words, folder=tmp_path / "ranks", **environment)
    print(done.codes, done.stderr, time.monotonic() - begin)
    return done


def test_a(tmp_path):
    fails(tmp_path, "raise ZeroDivisionError('one over nothing')")
    assert 0

def test_b(tmp_path):
    fails(tmp_path, "os.kill(os.getpid(), 9)")
    assert 0

def test_c(tmp_path):
    fails(tmp_path, "os._exit(7)", size=3)
    assert 0
