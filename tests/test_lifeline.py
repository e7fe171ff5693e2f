"""One rank fails: all end within seconds, one of them says why, and torchrun's restart goes on from the checkpoint."""

import os
import signal
import sys
import time

import pytest
import torch
from conftest import LIGHT, QUICK, quick, two_blocks
from ranks import ended, start, together
from test_trainer import rewards
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from flowtilt import UserError
from flowtilt.cli import main
from flowtilt.distributed import attention, lifeline
from flowtilt.distributed import world as distributed
from flowtilt.runs import folder as runs

REWARD = """
import os
from pathlib import Path
from flowtilt.playground.verify import score

calls = 0

def f(images, prompts):
    global calls
    calls += 1
    if os.environ["RANK"] == "1" and calls == 3:
        {what}
    return score(images, prompts)
"""


def words(tmp_path, what, *overrides):
    (tmp_path / "mine.py").write_text(REWARD.format(what=what))
    return ["train", "playground", *QUICK, two_blocks(), *LIGHT, f"rewards.mine={tmp_path}/mine.py:f", *overrides]


def check_one_line(stderr, said):
    lines = [line for line in stderr.splitlines() if "flowtilt: " in line]
    assert len(lines) == 1 and said in lines[0], stderr[-3000:]


@pytest.mark.parametrize(
    ("what", "size", "codes", "said"),
    [
        ("raise ZeroDivisionError('one over nothing')", 2, [2, 2], "rank 1: reward mine failed: ZeroDivisionError: one over nothing"),
        ("os.kill(os.getpid(), 9)", 3, [1, -9, 1], "rank 1 is gone without a word"),
    ],
)
def test_a_rank_that_fails_ends_all_with_one_line(tmp_path, what, size, codes, said):
    done = together(size, main, words(tmp_path, what, f"run={tmp_path}/run"), folder=tmp_path / "ranks", within=60)
    assert done.codes == codes, done.stderr[-3000:]
    check_one_line(done.stderr, said)
    assert "Traceback" not in done.stderr


def unexpected():
    raise RuntimeError("nobody\nthought of this")


def killed():
    os.kill(os.getpid(), signal.SIGKILL)


def fail(culprit, how, deaf):
    """One rank fails; the others wait for it in a message, or where neither signals nor lost connections reach them."""
    signal.signal(signal.SIGTERM, lambda *_: None)
    with lifeline.fail_together():
        world = distributed.start()
        if world.rank == culprit:
            how()
        if deaf:
            signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
            time.sleep(1000)
        world.barrier()


FAILURES = [
    (1, unexpected, True, "flowtilt: rank 1: RuntimeError: nobody thought of this; all ranks end"),
    (0, unexpected, False, "flowtilt: rank 0: RuntimeError"),
    (0, killed, True, "flowtilt: rank 0 is gone without a word"),
    (1, killed, False, "flowtilt: rank 1 is gone without a word"),
]


@pytest.fixture(scope="module")
def failed(tmp_path_factory):
    """How the ranks of each job ended; all at once, as most of them wait."""
    jobs = []
    for culprit, how, deaf, _ in FAILURES:
        folder = tmp_path_factory.mktemp("failed")
        jobs.append((start(2, fail, culprit, how, deaf, folder=folder), folder))
    return [ended(*job, within=30) for job in jobs]


@pytest.mark.parametrize("case", range(len(FAILURES)))
def test_only_the_rank_that_failed_shows_a_traceback_and_nobody_waits(failed, case):
    done, (culprit, how, _, said) = failed[case], FAILURES[case]
    assert done.codes[1 - culprit] == 1 and done.codes[culprit] in (1, -signal.SIGKILL)
    check_one_line(done.stderr, said)
    assert "Traceback" not in done.errors[1 - culprit]
    assert ("Traceback" in done.errors[culprit]) == (how is unexpected)


def hang(folder, how):
    """The last rank comes to a message late: once it is told to, or after so many seconds."""
    attention.PATIENCE = 3.0
    with lifeline.fail_together():
        world = distributed.start()
        world.barrier()
        if world.rank == 1:
            (folder / "hangs").touch()
            end = time.monotonic() + (how or 60)
            while time.monotonic() < end and not (folder / "go").exists():
                time.sleep(0.02)
        world.barrier()
    return 0


def test_a_rank_that_hangs_is_named_once_and_the_job_goes_on_when_it_does(tmp_path):
    jobs, stopped = [], []
    for name, rank, how in (("stopped", 1, None), ("stopped hub", 0, None), ("works", None, 6.0)):
        folder = tmp_path / name
        folder.mkdir()
        processes = start(2, hang, folder, how, folder=folder)
        jobs.append((processes, folder))
        end = time.monotonic() + 60
        while not (folder / "hangs").exists():
            assert time.monotonic() < end
            time.sleep(0.02)
        if rank is not None:
            os.kill(processes[rank].pid, signal.SIGSTOP)
            stopped.append(processes[rank].pid)
            (folder / "go").touch()
    time.sleep(6)
    for pid in stopped:
        os.kill(pid, signal.SIGCONT)
    for job, said in zip(jobs, ("rank 1 is silent", "rank 0 is silent", "rank 1 keeps the others waiting"), strict=True):
        done = ended(*job, within=60)
        assert done.codes == [0, 0], done.stderr[-3000:]
        check_one_line(done.stderr, f"{said} for 3 s")


def worker(folder, words):
    """What torchrun starts."""
    os.chdir(folder)
    with (folder / "stderr").open("a") as file:
        os.dup2(file.fileno(), 2)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    torch.set_num_threads(1)
    sys.exit(main(words))


def test_torchrun_starts_a_job_anew_and_it_goes_on_with_the_run_it_made(finished, tmp_path):
    once = f"(Path({str(tmp_path)!r}) / 'killed').exists() or (Path({str(tmp_path)!r}) / 'killed').touch() or os.kill(os.getpid(), 9)"
    given = words(tmp_path, once, "rewards.mine.weight=0", "rollouts=3")
    # torchrun's own agent, whose workers are forked here
    how = {"rdzv_backend": "c10d", "rdzv_endpoint": "localhost:0", "run_id": "17", "max_restarts": 1, "start_method": "forkserver"}
    elastic_launch(LaunchConfig(min_nodes=1, max_nodes=1, nproc_per_node=2, **how), worker)(tmp_path, given)
    stderr = (tmp_path / "stderr").read_text()
    check_one_line(stderr, "rank 1 is gone without a word")
    assert "Traceback" not in stderr and (tmp_path / "killed").exists()
    assert [path.name for path in (tmp_path / "runs").iterdir()] == ["playground"]
    assert rewards(tmp_path / "runs" / "playground") == pytest.approx(rewards(finished)[:3], abs=1e-6)


def test_a_run_that_was_meant_to_stop_is_not_started_again(tmp_path, monkeypatch):
    (tmp_path / "mine.py").write_text(
        "def f(images, prompts):\n    scores = images.mean((1, 2, 3))\n    scores[0] = float('nan')\n    return scores\n"
    )
    given = ["train", "playground", *QUICK, f"rewards.mine={tmp_path}/mine.py:f", "guards=stop", "evaluate.images=2", "evaluate.every=0"]
    assert main([*given, f"run={tmp_path}/run"]) == 3
    monkeypatch.setenv("TORCHELASTIC_MAX_RESTARTS", "1")
    assert main([*given, f"run={tmp_path}/again"]) == 0
    assert rewards(tmp_path / "again") == rewards(tmp_path / "run") and len(rewards(tmp_path / "run")) == 1


def test_a_restart_finds_its_own_run_and_no_other(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    world, recipe = distributed.start(), quick(tmp_path / "run").model_copy(update={"run": None})
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "41")
    runs.create(recipe)
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "42")
    assert runs.of_job(recipe, world) is None
    own = runs.create(recipe)
    runs.create(recipe.model_copy(update={"name": "other"}))
    assert str(own.folder) == "runs/playground-2" and runs.of_job(recipe, world) is None
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    assert runs.of_job(recipe, world) == own.folder
    # a start that was refused never takes over what was there
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "43")
    theirs = recipe.model_copy(update={"run": str(own.folder)})
    assert runs.of_job(theirs, world) is None
    own.release()
    with pytest.raises(UserError, match="not empty"):
        runs.create(theirs)


def test_a_start_that_was_killed_before_its_recipe_was_written_leaves_a_folder_to_start_in(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "42")
    recipe = quick(tmp_path / "run")
    runs.create(recipe)
    (tmp_path / "run" / "recipe.toml").unlink()
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    assert runs.of_job(recipe, distributed.start()) is None
    assert runs.create(recipe).folder == tmp_path / "run"
