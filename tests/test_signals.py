"""Signals end a command cleanly, whichever process gets them and when: ranks stop at one rollout, saved, and nothing differs later."""

import os
import random
import signal
import subprocess
import sys
import threading
import time

import pytest
import torch
from conftest import LIGHT, LONGER, QUICK, quick, two_blocks
from ranks import ended, start
from test_resume import contents

from flowtilt import Trainer, checkpoint, signals
from flowtilt.cli import main
from flowtilt.files import read_lines
from flowtilt.runs import open_run

ALL = signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1
SLOW_JUDGE = """
import time
from pathlib import Path

def slow(images, prompts):
    if (Path(__file__).parent / "slow").exists() and len(images) != {rollout}:
        (Path(__file__).parent / "evaluating").touch()
        time.sleep(300)
    return images.mean((1, 2, 3))
"""


def wait_for(path, within=60):
    end = time.monotonic() + within
    while not path.exists():
        assert time.monotonic() < end, f"no {path.name}"
        time.sleep(0.01)


def send(process, number):
    if process.is_alive():
        os.kill(process.pid, number)


def check_ended(done):
    assert all(code in (0, 130) for code in done.codes), (done.codes, done.stderr[-3000:])
    assert "Traceback" not in done.stderr and "gone without a word" not in done.stderr, done.stderr[-3000:]


def test_two_ranks_stop_at_one_rollout_whoever_is_signalled_and_the_run_goes_on_to_the_same_bits(tmp_path):
    """Each start of a job gets the next signal at a random instant, on one rank, on the other or on both; twice where both."""
    rng, run, words = (
        random.Random(1),
        tmp_path / "run",
        [*QUICK, two_blocks(), *LIGHT, "steps=8", "evaluate.every=3", "checkpoint.every=50"],
    )
    whole = ended(
        start(2, main, ["train", "playground", *words, f"run={tmp_path / 'whole'}"], folder=tmp_path / "ranks"), tmp_path / "ranks", 120
    )
    assert whole.codes == [0, 0], whole.stderr[-3000:]
    last = read_lines(tmp_path / "whole" / "metrics.jsonl")[-1]["seconds"]
    interrupted = 0
    for number, to in [(ALL[k % 4], ([1], [0], [0, 1])[k % 3]) for k in range(7)] + [(None, [])]:
        given = ["--resume", str(run)] if (run / "recipe.toml").exists() else ["playground", *words, f"run={run}"]
        logged = len(read_lines(run / "metrics.jsonl"))
        processes = start(2, main, ["train", *given], folder=tmp_path / "ranks")
        if number is not None:
            end = time.monotonic() + 60
            while len(read_lines(run / "metrics.jsonl")) == logged and time.monotonic() < end and processes[0].is_alive():
                time.sleep(0.005)
            time.sleep(rng.uniform(0, 0.4 * last))
            for rank in to * len(to):
                send(processes[rank], number)
        done = ended(processes, tmp_path / "ranks", 60)
        print(number, to, done.codes, done.errors)
        check_ended(done)
        interrupted += done.codes[0] == 130
        at = checkpoint.newest(run)
        assert at is not None and len(read_lines(run / "metrics.jsonl")) == at.step
        if done.codes[0] == 0:
            break
    assert interrupted >= 3 and done.codes == [0, 0]
    assert contents(run) == contents(tmp_path / "whole")
