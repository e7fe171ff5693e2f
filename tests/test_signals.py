"""Signals end a command cleanly, whichever process gets them and when: ranks stop at one rollout, saved, and nothing differs later."""

import os
import random
import signal
import time

import pytest
from commands import typed
from conftest import LIGHT, LONGER, QUICK, quick, two_blocks
from ranks import ended, forked, start
from test_lifeline import worker
from test_resume import contents
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from flowtilt import Trainer
from flowtilt.cli import main
from flowtilt.distributed import signals
from flowtilt.distributed.torchrun import interrupted_status
from flowtilt.io.files import read_lines
from flowtilt.io.locks import is_held
from flowtilt.runs import checkpoint
from flowtilt.runs.folder import open_run

ALL = signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1


def wait_until(true, within=120):
    end = time.monotonic() + within
    while not true():
        assert time.monotonic() < end
        time.sleep(0.005)


def test_two_ranks_stop_at_one_rollout_whoever_is_signalled_and_the_run_goes_on_to_the_same_bits(tmp_path):
    """Each start of a job gets the next signal at a random instant: one rank, the other, or both of them twice."""
    rng, run, whole = random.Random(1), tmp_path / "run", tmp_path / "whole"
    words = ["playground", *QUICK, two_blocks(), *LIGHT, "rollouts=16", "evaluate.every=3", "checkpoint.every=50"]

    def job(name, *given):
        return start(2, main, ["train", *given], folder=tmp_path / name), tmp_path / name

    unbroken, logged, interrupted = job("unbroken", *words, f"run={whole}"), 0, 0
    for k in range(4):
        given = ["--resume", str(run)] if (run / "recipe.toml").exists() else [*words, f"run={run}"]
        processes, folder = job(f"start-{k}", *given)
        wait_until(lambda: len(read_lines(run / "metrics.jsonl")) > logged)  # noqa: B023
        time.sleep(rng.uniform(0, 0.2))
        to = ([1], [0], [0, 1])[k % 3]
        for rank in to * len(to):
            if processes[rank].is_alive():
                os.kill(processes[rank].pid, ALL[k])
        done = ended(processes, folder, 60)
        assert all(code in (0, 130) for code in done.codes), (done.codes, done.stderr[-3000:])
        assert "Traceback" not in done.stderr and "gone without a word" not in done.stderr, done.stderr[-3000:]
        logged, at = len(read_lines(run / "metrics.jsonl")), checkpoint.newest(run)
        assert at is not None and logged == at.step
        interrupted += done.codes[0] == 130
    assert interrupted >= 3
    assert ended(*job("last", "--resume", str(run)), within=120).codes == [0, 0]
    assert ended(*unbroken, within=120).codes == [0, 0]
    assert contents(run) == contents(whole)


def torchrun(folder, words):
    """torchrun's own agent with two ranks."""
    how = {"rdzv_backend": "c10d", "rdzv_endpoint": "localhost:0", "run_id": folder.name, "max_restarts": 0, "start_method": "fork"}
    elastic_launch(LaunchConfig(min_nodes=1, max_nodes=1, nproc_per_node=2, **how), worker)(folder, words)


def test_a_signal_to_torchrun_saves_the_run(tmp_path):
    """SIGUSR1 kills torchrun without reaching the ranks, which notice that it is gone."""
    rng, jobs = random.Random(2), {}
    for number in (signal.SIGHUP, signal.SIGINT, signal.SIGUSR1):
        folder = tmp_path / number.name
        folder.mkdir()
        words = ["train", "playground", *QUICK, two_blocks(), *LIGHT, "rollouts=500", "checkpoint.every=500", f"run={folder}/run"]
        jobs[number] = (forked(torchrun, folder, words), folder)
    for number, (process, folder) in jobs.items():
        wait_until(lambda: len(read_lines(folder / "run" / "metrics.jsonl")) > 1)  # noqa: B023
        time.sleep(rng.uniform(0, 0.2))
        os.kill(process.pid, number)
    for process, folder in jobs.values():
        process.join(60)
        assert process.exitcode not in (None, 0)
        wait_until(lambda: not is_held(folder / "run"), 30)  # noqa: B023
        stderr, at = (folder / "stderr").read_text(), checkpoint.newest(folder / "run")
        assert "Traceback" not in stderr and at is not None, stderr[-3000:]
        assert len(read_lines(folder / "run" / "metrics.jsonl")) == at.step > 1


JUDGE = """
import time
from pathlib import Path
from flowtilt.playground.verify import score
here = Path(__file__).parent

def judge(images, prompts):
    if (here / "slow").exists() and (here / "run" / "checkpoints" / "step-000002").exists():
        (here / "judging").touch()
        time.sleep(100)
    return images.mean((1, 2, 3))
"""


@pytest.mark.parametrize("ranks", [1, 2])
def test_interrupted_in_an_evaluation_a_run_is_saved_and_makes_it_when_it_goes_on(tmp_path, ranks):
    (tmp_path / "mine.py").write_text(JUDGE)
    words = ["playground", *QUICK, two_blocks(), *LIGHT, *LONGER, f"rewards.j={tmp_path}/mine.py:judge", "rewards.j.weight=0"]
    words = [*words, 'evaluate.rewards=["j"]', "checkpoint.every=100"]
    (tmp_path / "slow").touch()
    processes = start(ranks, main, ["train", *words, f"run={tmp_path}/run"], folder=tmp_path / "ranks")
    wait_until((tmp_path / "judging").exists)
    sent = time.monotonic()
    os.kill(processes[-1].pid, signal.SIGTERM)
    done = ended(processes, tmp_path / "ranks", 60)
    assert done.codes == [130] * ranks and time.monotonic() - sent < 30
    assert "Traceback" not in done.stderr and done.stderr.count("flowtilt: interrupted; go on from the last checkpoint with") == 1
    at = checkpoint.newest(tmp_path / "run")
    assert at is not None and at.step == 2 and [record["rollout"] for record in read_lines(tmp_path / "run" / "evaluations.jsonl")] == [0]
    (tmp_path / "slow").unlink()
    again = [start(ranks, main, ["train", *given], folder=tmp_path / name) for name, given in (
        ("again", ["--resume", f"{tmp_path}/run"]),
        ("unbroken", [*words, f"run={tmp_path}/whole"]),
    )]  # fmt: skip
    for job, name in zip(again, ("again", "unbroken"), strict=True):
        assert (done := ended(job, tmp_path / name, 120)).codes == [0] * ranks, done.stderr[-3000:]
    assert contents(tmp_path / "run") == contents(tmp_path / "whole")


def test_guards_know_an_evaluation_that_was_made_after_the_checkpoint_they_come_from(tmp_path):
    run = tmp_path / "run"
    overrides = [*LONGER, "rewards.dark=jpeg_incompressibility", "rewards.dark.weight=0", 'evaluate.rewards=["light","dark"]']
    trainer = Trainer(quick(run, *overrides))
    trainer.run()
    again = Trainer(open_run(run, []), resume=run)
    again.run()
    assert again.guards.state == trainer.guards.state and again.guards.state["history"]["best"]


def test_a_signal_while_models_load_ends_a_command_at_once(tmp_path):
    (tmp_path / "mine.py").write_text("import time, pathlib\npathlib.Path('loading').touch()\ntime.sleep(100)\n")
    command = typed("train", "playground", *QUICK, "rewards.mine=mine.py:f", cwd=tmp_path)
    wait_until((tmp_path / "loading").exists)
    os.kill(command.process.pid, signal.SIGHUP)
    assert command.ended(30) == (130, "", "flowtilt: interrupted\n")


# what signals do to a process ---------------------------------------------------------------------------------


class Work:
    interrupted, unsaved = False, True


def test_work_that_is_not_saved_is_told_and_signals_that_come_twice_are_one():
    ending, work = signals.Ending(), Work()
    ending.protect(work, tell=False)
    for number in (signal.SIGTERM, signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
        ending.handle(number, None)
    assert work.interrupted
    work.unsaved = False
    with pytest.raises(KeyboardInterrupt):
        ending.handle(signal.SIGTERM, None)
    ending.handle(signal.SIGINT, None)  # cleaning up goes on


def test_a_second_ctrl_c_stops_at_once(monkeypatch):
    ending, work, now = signals.Ending(), Work(), [0.0]
    ending.protect(work, tell=False)
    monkeypatch.setattr(signals.time, "monotonic", lambda: now[0])
    ending.handle(signal.SIGINT, None)
    now[0] += signals.SECOND_INTERRUPT_SECONDS + 1
    ending.handle(signal.SIGTERM, None)
    with pytest.raises(KeyboardInterrupt):
        ending.handle(signal.SIGINT, None)


def test_what_has_ended_is_not_interrupted():
    ending = signals.Ending()
    ending.over()
    ending.handle(signal.SIGTERM, None)


def _stuck(folder):
    signals.FORCE = 0.2
    signals.install()
    signal.pthread_sigmask(signal.SIG_BLOCK, ALL)  # as inside of C: nothing calls the main thread back
    (folder / "stuck").touch()
    time.sleep(60)


def test_a_process_whose_main_thread_does_not_answer_is_ended(tmp_path):
    process = forked(_stuck, tmp_path)
    wait_until((tmp_path / "stuck").exists)
    os.kill(process.pid, signal.SIGTERM)
    process.join(30)
    assert process.exitcode == 130


def _fork_in_a_command():
    signals.install()
    signals.current().protect(Work(), tell=False)
    if child := os.fork():
        time.sleep(0.5)  # until the child has Python's own handlers
        os.kill(child, signal.SIGTERM)
        status = os.waitpid(child, 0)[1]
        os._exit(0 if os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGTERM else 1)
    time.sleep(60)
    os._exit(0)


def test_a_process_that_a_reward_forks_ends_by_signals_as_any_other():
    process = forked(_fork_in_a_command)
    process.join(60)
    assert process.exitcode == 0


def test_an_interruption_is_no_failure_to_torchrun(monkeypatch):
    assert interrupted_status() == 130
    monkeypatch.setenv("TORCHELASTIC_MAX_RESTARTS", "1")
    assert interrupted_status() == 0
