"""A run's folder: one writer, nobody else's files touched, and nothing taken back that can't be made again."""

import json
import os
import shutil
import signal
import threading
import time
from pathlib import Path

import pytest
import torch
from conftest import LONGER, quick
from holders import held_by
from ranks import forked

from flowtilt import Trainer, UserError
from flowtilt.config import load_recipe
from flowtilt.distributed.world import World
from flowtilt.evaluate.folder import opened
from flowtilt.io.files import append_line, read_lines
from flowtilt.io.locks import FILES, Hold
from flowtilt.runs import checkpoint
from flowtilt.runs import folder as runs
from flowtilt.runs.checkpoint import Checkpoint

ALONE = World(0, 1, torch.device("cpu"))


def content(folder: Path) -> dict[str, bytes | None]:
    """Every file and folder below, but for the lock's."""
    found = {str(path.relative_to(folder)): path for path in folder.rglob("*") if path.name not in FILES}
    return {name: path.read_bytes() if path.is_file() else None for name, path in found.items()}


def refused(function, *args, match=None):
    """That it raises a UserError of one line; returns the line."""
    with pytest.raises(UserError, match=match) as caught:
        function(*args)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def made(folder: Path, *steps: int, keep: int = 9) -> Path:
    """A run with checkpoints after some steps, as far as this module's functions look at one."""
    runs.create(quick(folder)).release()
    for step in steps:
        checkpoint.save(folder, Checkpoint(step, {"clock": {"step": step}}, {"current": {"w": torch.full((3,), float(step))}}), keep)
        append_line(folder / "metrics.jsonl", {"rollout": step, "loss": 0.5})
    return folder


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


# one writer ------------------------------------------------------------------------------------------


def test_a_run_that_another_process_holds_is_refused_until_that_is_killed(tmp_path):
    folder = made(tmp_path / "run", 1)
    with held_by("a training run", folder) as pid:
        before = content(folder)
        said = refused(runs.resume, folder)
        assert f"process {pid} on {os.uname().nodename}, since 20" in said and str(folder) in said
        assert content(folder) == before
    runs.resume(folder).release()


def _hold_with_child(folder):
    hold = Hold(folder, "a training run")
    child = os.fork()
    if not child:
        time.sleep(60)
        os._exit(0)
    (folder / "child").write_text(f"{child} ")
    time.sleep(60)
    hold.release()


def test_what_a_killed_process_has_forked_does_not_hold_its_run(tmp_path):
    """A reward may have workers of its own."""
    process = forked(_hold_with_child, tmp_path)
    while not (tmp_path / "child").exists() or not (tmp_path / "child").read_text().endswith(" "):
        time.sleep(0.01)
    process.kill()
    process.join()
    Hold(tmp_path, "a training run").release()
    os.kill(int((tmp_path / "child").read_text()), signal.SIGKILL)


def test_a_folder_is_held_once_in_one_process_too(tmp_path):
    first = Hold(tmp_path, "a training run")
    refused(Hold, tmp_path, "a training run", match=r"this very process.*close\(\)")
    first.release()
    second = Hold(tmp_path, "a training run")
    second.itself = second  # what is garbage, but only the collector can see
    del second
    Hold(tmp_path, "a training run").release()
    assert names(tmp_path) == [".lock"]


def test_a_file_system_without_locks_still_refuses_a_second_process_of_this_machine(tmp_path, monkeypatch, capsys):
    with held_by("a training run", tmp_path) as pid:
        monkeypatch.setattr("flowtilt.io.locks.FileLock.acquire", lambda *_, **__: (_ for _ in ()).throw(OSError(38, "no locks")))
        assert str(pid) in refused(Hold, tmp_path, "a training run")
    Hold(tmp_path, "a training run").release()
    assert not capsys.readouterr().err  # nobody has left a note: there is nothing to be warned of


def _start(folder: Path, at: float, recipe):
    os.chdir(folder)
    time.sleep(max(0.0, at - time.time()))
    for _ in range(10):
        try:
            hold = runs.create(recipe)
        except UserError:
            continue
        with (folder / "got").open("a") as file:
            file.write(f"{hold.folder}\n")
        time.sleep(0.01)


def race(folder: Path, recipe) -> list[str]:
    """What four processes got that start new runs at the same instants."""
    at = time.time() + 1
    processes = [forked(_start, folder, at, recipe) for _ in range(4)]
    for process in processes:
        process.join(60)
        assert process.exitcode == 0
    return (folder / "got").read_text().split()


def test_starts_at_the_same_instant_never_get_the_same_folder(tmp_path):
    got = race(tmp_path, quick(tmp_path).model_copy(update={"run": None}))
    assert len(got) == len(set(got)) == 40
    assert all((tmp_path / folder / "recipe.toml").is_file() for folder in got)


def test_of_starts_in_one_folder_one_wins(tmp_path):
    assert race(tmp_path, quick(tmp_path / "run")) == [str(tmp_path / "run")]


def test_of_two_evaluations_of_one_folder_the_second_changes_nothing(tmp_path):
    folder = tmp_path / "e"
    with opened(folder, lambda: {"seed": 1}, ALONE):
        before = content(folder)
        refused(opened(folder, lambda: {"seed": 1}, ALONE).__enter__, match="an evaluation")
        assert content(folder) == before
    with opened(folder, lambda: {"seed": 1}, ALONE):
        pass


# other people's files --------------------------------------------------------------------------------

LOOK_ALIKES = (".notes.tmp", ".cache.tmp", ".conf.1.old", ".bashrc.old", ".recipe.toml.tmp", ".mine.123.tmp", ".lora.old")


@pytest.mark.parametrize("refuse", [lambda folder: runs.create(quick(folder)), lambda folder: opened(folder, dict, ALONE).__enter__()])
def test_a_refused_command_touches_nothing(tmp_path, refuse):
    for name in LOOK_ALIKES:
        (tmp_path / name).write_text(name)
    (tmp_path / ".lora.99.old").mkdir()
    before = content(tmp_path)
    refused(refuse, tmp_path, match="not empty")
    assert content(tmp_path) == before and not (tmp_path / ".lock").exists()


def test_a_resumed_run_removes_its_own_leftovers_and_nothing_else(tmp_path):
    folder = made(tmp_path / "run", 1)
    for name in (*LOOK_ALIKES, "checkpoints/.mine.3.tmp", "samples/.step-x.3.tmp"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(name)
    before = content(folder)
    (folder / ".report.html.123.tmp").write_text("half")
    (folder / "checkpoints" / ".step-000002.123.tmp").mkdir()
    (folder / "samples" / ".step-000002.123.old").mkdir()
    (folder / "..holder.json.7.tmp").write_text("")
    runs.resume(folder).release()
    assert content(folder) == {**before, "samples/step-000002": None}


def test_an_evaluation_that_goes_on_removes_what_a_kill_left_among_its_images(tmp_path):
    with opened(tmp_path / "e", dict, ALONE):
        pass
    images = tmp_path / "e" / "images" / "set" / "tuned"
    images.mkdir(parents=True)
    for name in (".00001-00.png.123.tmp", ".mine.png.123.tmp", "00000-00.png"):
        (images / name).write_text("")
    with opened(tmp_path / "e", dict, ALONE):
        assert names(images) == [".mine.png.123.tmp", "00000-00.png"]


def test_copies_and_other_names_in_a_runs_folders_are_the_users(tmp_path):
    folder = made(tmp_path / "run", 1, 2)
    for name in ("step-000002-best", "step-abc", "step-2", "old"):
        shutil.copytree(folder / "checkpoints" / "step-000002", folder / "checkpoints" / name)
    for name in ("step-x", "step-000009-mine", "step-000001", "step-000009"):
        (folder / "samples" / name).mkdir(parents=True)
    checkpoint.save(folder, Checkpoint(3, {}, {"current": {"w": torch.zeros(2)}}), keep=2)
    assert names(folder / "checkpoints") == ["old", "step-000002", "step-000002-best", "step-000003", "step-2", "step-abc"]
    assert checkpoint.newest(folder).step == 3
    runs.rewind(folder, 3)
    assert names(folder / "samples") == ["step-000001", "step-000009-mine", "step-x"]


def test_a_copy_under_another_number_is_never_taken_for_a_checkpoint(tmp_path):
    folder = made(tmp_path / "run", 1)
    shutil.copytree(folder / "checkpoints" / "step-000001", folder / "checkpoints" / "step-000009")
    with pytest.warns(UserWarning, match="a copy of the one of step 1"):
        assert checkpoint.newest(folder).step == 1
    assert names(folder / "checkpoints") == ["step-000001", "step-000009.damaged"]


def test_a_reused_folder_is_free_where_only_a_killed_start_left_something(tmp_path):
    (tmp_path / "run").mkdir()
    for name in (".recipe.toml.123.tmp", ".lock", ".holder.json", "torchrun.txt"):
        (tmp_path / "run" / name).write_text("")
    runs.create(quick(tmp_path / "run")).release()
    assert names(tmp_path / "run") == [".lock", "recipe.toml", "torchrun.txt"]


@pytest.mark.parametrize("name", [".", "..", "...", "a/b", ""])
def test_a_runs_name_is_the_name_of_a_folder_of_its_own(name):
    with pytest.raises(UserError, match="name"):
        load_recipe("playground", [f"name={name!r}"])


# nothing that can't be made again is taken back --------------------------------------------------------


@pytest.mark.parametrize(
    "gone", [("checkpoints",), ("checkpoints", "metrics.jsonl"), ("checkpoints", "metrics.jsonl", "evaluations.jsonl")]
)
def test_a_run_without_checkpoints_is_not_begun_again_over_its_results(finished, tmp_path, gone):
    folder = shutil.copytree(finished, tmp_path / "run")
    for name in gone:
        shutil.rmtree(folder / name) if (folder / name).is_dir() else (folder / name).unlink()
    before = content(folder)
    assert "checkpoint" in refused(runs.resume, folder, match="has reached")
    refused(Trainer, quick(folder, *LONGER), folder, match="has reached")
    assert content(folder) == before


def test_a_run_that_was_killed_before_its_first_checkpoint_begins_again(tmp_path):
    folder = made(tmp_path / "run")
    append_line(folder / "evaluations.jsonl", {"rollout": 0, "score": 0.1})
    (folder / "samples" / "step-000000").mkdir(parents=True)
    runs.resume(folder).release()


def test_checkpoints_are_ordered_by_number(tmp_path):
    folder = made(tmp_path / "run", 999_998, 999_999, 1_000_000, keep=2)
    assert names(folder / "checkpoints") == ["step-1000000", "step-999999"]
    assert checkpoint.newest(folder).step == 1_000_000


@pytest.mark.parametrize("number", [5, 13, 116])
def test_a_checkpoint_that_cannot_be_read_is_not_a_damaged_one(tmp_path, monkeypatch, number):
    folder = made(tmp_path / "run", 1, 2)
    before = content(folder)

    def unreadable(path):
        raise OSError(number, os.strerror(number), str(path))

    monkeypatch.setattr(checkpoint, "digest", unreadable)
    assert os.strerror(number) in refused(checkpoint.newest, folder, match="can't read")
    assert content(folder) == before


def test_a_damaged_checkpoint_is_set_aside(tmp_path):
    folder = made(tmp_path / "run", 1, 2)
    for attempt in ("step-000002.damaged", "step-000002.damaged-2"):
        checkpoint.save(folder, Checkpoint(2, {}, {"current": {"w": torch.zeros(2)}}), keep=2)
        (folder / "checkpoints" / "step-000002" / "current.safetensors").write_bytes(b"half")
        with pytest.warns(UserWarning, match="is damaged"):
            assert checkpoint.newest(folder).step == 1
        assert (folder / "checkpoints" / attempt / "current.safetensors").read_bytes() == b"half"
    assert names(folder / "checkpoints") == ["step-000001", "step-000002.damaged", "step-000002.damaged-2"]


def test_a_changed_number_in_a_checkpoints_state_is_noticed_and_an_older_format_still_read(tmp_path):
    folder = made(tmp_path / "run", 1)
    place = folder / "checkpoints" / "step-000001" / "state.json"
    written = place.read_text()
    place.write_text(written.replace('"clock": {\n   "step": 1', '"clock": {\n   "step": 7'))
    assert place.read_text() != written
    refused(checkpoint.newest, folder, match=r"state\.json is not what was written")
    place.write_text(
        json.dumps({"format": 3, **{key: value for key, value in json.loads(written).items() if key in ("step", "state", "sha256")}})
    )
    assert checkpoint.newest(folder).step == 1


TAIL = {"nul": b"\0" * 37, "no UTF-8": b'{"rollout": 9, "x": "\xff', "torn": b'{"rollout": 9,'}


@pytest.mark.parametrize("tail", TAIL)
def test_a_torn_tail_is_dropped_without_a_word(tmp_path, tail, recwarn):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"rollout": 1}\n{"rollout": 2}\n' + TAIL[tail])
    assert read_lines(path) == [{"rollout": 1}, {"rollout": 2}] and not recwarn.list
    runs.rewind(tmp_path, 2)
    assert path.read_bytes() == b'{"rollout": 1}\n{"rollout": 2}\n' and names(tmp_path) == ["metrics.jsonl"]


def test_what_was_appended_after_a_torn_tail_of_nul_bytes_is_read(tmp_path):
    (tmp_path / "m.jsonl").write_bytes(b'{"rollout": 1}\n\0\0\0{"rollout": 2}\n')
    assert read_lines(tmp_path / "m.jsonl") == [{"rollout": 1}, {"rollout": 2}]


def test_damaged_lines_in_the_middle_are_counted_and_kept_beside_the_file(tmp_path):
    path = tmp_path / "metrics.jsonl"
    damaged = b'{"rollout": 1}\n{"st\n\xff\xfe\n{"loss": 3}\n{"rollout": 2}\n' + b"[" * 100_000 + b"\n" + b'{"rollout": 3}\n{"rollout"'
    path.write_bytes(damaged)
    with pytest.warns(UserWarning, match=r"metrics\.jsonl: 3 lines, the first of them 2, are damaged"):
        runs.rewind(tmp_path, 2)
    assert read_lines(path) == [{"rollout": 1}, {"rollout": 2}]
    assert (tmp_path / "metrics.jsonl.damaged").read_bytes() == damaged


def test_a_score_before_training_is_missing_rather_than_a_later_one(tmp_path):
    assert runs.scores(tmp_path) == (None, None)
    for step, score in ((10, 0.5), (20, 0.75)):
        append_line(tmp_path / "evaluations.jsonl", {"rollout": step, "score": score})
    append_line(tmp_path / "evaluations.jsonl", {"score": 0.9})
    assert runs.scores(tmp_path) == (None, 0.75)


def test_a_run_that_cannot_be_read_is_one_line(tmp_path, monkeypatch):
    folder = made(tmp_path / "run", 1)

    def denied(self, *args, **keywords):
        raise PermissionError(13, "Permission denied", str(self))

    for name in ("iterdir", "is_file", "stat"):
        with monkeypatch.context() as patch:
            patch.setattr(Path, name, denied)
            refused(runs.open_run, folder, [], match=r"can't read .*Permission denied")


# a trainer -------------------------------------------------------------------------------------------


def test_a_trainer_holds_its_run_until_it_has_ended_and_may_go_on(finished, tmp_path):
    folder = tmp_path / "run"
    trainer = Trainer(quick(folder, "rollouts=3", "evaluate.every=0"))
    log = trainer._log

    def log_and_press_ctrl_c(*args):
        log(*args)
        if trainer.clock.step == 1:
            refused(Trainer, runs.open_run(folder, []), str(folder), match="held by a training run")
            signal.raise_signal(signal.SIGINT)

    trainer._log = log_and_press_ctrl_c
    handler = signal.getsignal(signal.SIGINT)
    assert trainer.run() is None and signal.getsignal(signal.SIGINT) is handler
    assert checkpoint.newest(folder).step == 1
    assert trainer.run()["rollouts"] == 3
    assert [record["rollout"] for record in read_lines(folder / "metrics.jsonl")] == [1, 2, 3]
    # whoever went on in the meantime has another state
    other = Trainer(runs.open_run(folder, ["rollouts=4"]), resume=str(folder))
    refused(trainer.run, match="held by")
    other.run()
    refused(trainer.run, match="is at rollout 4 by now, not 3")


def test_a_trainer_that_can_not_be_made_holds_nothing(finished, tmp_path):
    folder = shutil.copytree(finished, tmp_path / "run")
    with pytest.raises(UserError, match="already at rollout 4") as kept:
        Trainer(runs.open_run(folder, ["rollouts=3"]), resume=folder)
    Trainer(runs.open_run(folder, []), resume=folder).close()
    assert kept.tb


def test_what_a_kill_kept_from_being_pruned_is_pruned(finished, tmp_path):
    folder = shutil.copytree(finished, tmp_path / "run")
    oldest = checkpoint.newest(folder)
    checkpoint.save(folder, Checkpoint(1, oldest.state, oldest.tensors), keep=9)
    Trainer(runs.open_run(folder, []), resume=folder).close()
    assert names(folder / "checkpoints") == ["step-000003", "step-000004"]


def test_a_run_in_another_thread_gets_no_signals_and_runs(tmp_path):
    trainer, found = Trainer(quick(tmp_path / "run", "rollouts=1", "evaluate.every=0")), []
    thread = threading.Thread(target=lambda: found.append(trainer.run()))
    thread.start()
    thread.join()
    assert found[0]["rollouts"] == 1
