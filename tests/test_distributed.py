"""Two processes compute what one computes, to fp32 rounding."""

import json
import os
import socket
import subprocess
import sys

import pytest
import torch
from conftest import QUICK
from test_trainer import rewards, weights

from flowtilt.cli import main
from flowtilt.distributed import World
from flowtilt.files import read_lines


def launch(folder, processes, *overrides):
    return torchrun(processes, "train", "playground", *QUICK, f"run={folder}", *overrides)


def torchrun(processes, *words):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    start = ["-m", "torch.distributed.run", f"--nproc-per-node={processes}", "--master-addr=127.0.0.1", f"--master-port={port}"]
    command = [sys.executable, *start, "-m", "flowtilt", *words]
    return subprocess.run(command, capture_output=True, text=True, timeout=240, env={**os.environ, "OMP_NUM_THREADS": "1"})


def test_one_and_two_processes_give_the_same_rewards_and_gradients(finished, tmp_path):
    # 6 prompts of 3 images over 2 ranks: a group is split between them
    done = launch(tmp_path / "two", 2, "steps=2")
    assert done.returncode == 0, done.stderr[-2000:]
    two, one = read_lines(tmp_path / "two" / "metrics.jsonl"), read_lines(finished / "metrics.jsonl")
    assert rewards(tmp_path / "two") == pytest.approx(rewards(finished)[:2], abs=1e-6)
    for name in ("grad_norm", "loss", "deviation"):
        assert two[0][name] == pytest.approx(one[0][name], rel=1e-4, abs=1e-12)
    assert two[1]["network_evaluations"] == one[1]["network_evaluations"]
    evaluated = [read_lines(folder / "evaluations.jsonl")[1] for folder in (tmp_path / "two", finished)]
    assert evaluated[0]["score"] == evaluated[1]["score"] and evaluated[0]["by_tag"] == evaluated[1]["by_tag"]
    assert (tmp_path / "two" / "lora" / "pytorch_lora_weights.safetensors").is_file()
    for name, value in weights(tmp_path / "two").items():
        assert torch.isfinite(value).all(), name


def test_two_processes_evaluate_what_one_does_and_count_no_prompt_twice(finished, tmp_path):
    given = ["--lora", str(finished), "--images", "70", "--rewards", "playground_strict,jpeg_incompressibility"]
    done = torchrun(2, "evaluate", *given, "-o", str(tmp_path / "two"))
    assert done.returncode == 0, done.stderr[-2000:]
    assert main(["evaluate", *given, "-o", str(tmp_path / "one")]) == 0
    two, one = (json.loads((tmp_path / name / "results.json").read_text()) for name in ("two", "one"))
    assert two["sets"] == one["sets"] and two["sets"]["playground"]["images"] == 70
    assert two["protocol"] == one["protocol"]


@pytest.mark.parametrize("number", [0, 1, 5, 144])
@pytest.mark.parametrize("size", [1, 2, 4, 7])
def test_shares_cover_every_row_once_and_differ_by_one_at_most(number, size):
    shares = [World(rank, size, torch.device("cpu")).share(number) for rank in range(size)]
    assert [k for share in shares for k in share] == list(range(number))
    assert max(map(len, shares)) - min(map(len, shares)) <= 1


def test_an_error_of_the_user_ends_all_processes(tmp_path):
    done = launch(tmp_path / "run", 2, "prompts=nowhere.txt")
    assert done.returncode != 0 and "flowtilt: prompts nowhere.txt" in done.stderr
    assert not (tmp_path / "run").exists()


def test_a_detail_that_only_one_rank_has_holds_up_nobody(tmp_path):
    (tmp_path / "mine.py").write_text(
        "import os\nfrom flowtilt import RewardOutput\n"
        "def f(images, prompts):\n"
        "    red = {'red': images[:, 0].mean((1, 2))} if os.environ['RANK'] == '1' else {}\n"
        "    return RewardOutput(images.mean((1, 2, 3)), details=red)\n"
    )
    done = launch(tmp_path / "run", 2, f"rewards.mine={tmp_path}/mine.py:f", "steps=1", 'evaluate.rewards=["playground"]')
    assert done.returncode == 0, done.stderr[-2000:]
    record = read_lines(tmp_path / "run" / "metrics.jsonl")[0]
    assert 0 < record["reward/mine/red"] < 1 and record["missing/mine"] == 0


def test_a_refusal_of_the_first_rank_is_every_ranks(tmp_path):
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "thesis.tex").touch()
    done = torchrun(2, "evaluate", "--images", "4", "--steps", "2", "-o", str(tmp_path / "taken"))
    assert done.returncode != 0 and done.stderr.count("flowtilt: ") == 2 and "Connection" not in done.stderr
    assert "not empty and no evaluation" in done.stderr
