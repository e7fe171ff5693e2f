"""Killed, interrupted, torn or out of space: a run goes on to the same bits, and nothing that was there is lost."""

import os
import random
import shutil
import signal
import time

import pytest
import torch
from conftest import LONGER, quick
from ranks import forked

from flowtilt import Trainer, UserError
from flowtilt.io import files
from flowtilt.io.files import read_lines
from flowtilt.io.locks import FILES
from flowtilt.policy.roles import ROLES
from flowtilt.runs import checkpoint
from flowtilt.runs.folder import open_run


def contents(run):
    """All that a run computed, as bytes and numbers; timings are not computed."""
    last = checkpoint.newest(run)
    assert last is not None
    tensors = {f"{file}.{name}": value.numpy().tobytes() for file, kept in last.tensors.items() for name, value in kept.items()}
    logs = [
        [{k: v for k, v in record.items() if "second" not in k and "time/" not in k} for record in read_lines(run / name)]
        for name in ("metrics.jsonl", "evaluations.jsonl")
    ]
    pictures = {path.relative_to(run): path.read_bytes() for path in (run / "samples").rglob("*.png")}
    return last.step, last.state["optimizer_steps"], tensors, logs, pictures


def temporaries(folder):
    return [path for path in folder.rglob(".*") if path.name not in FILES]


def train(folder, resume):
    torch.set_num_threads(1)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
    recipe = open_run(folder, []) if resume else quick(folder, *LONGER)
    Trainer(recipe, resume=folder if resume else None).run()


def test_killed_at_random_instants_a_run_ends_in_the_same_bits(finished, tmp_path):
    folder, rng, kills = tmp_path / "run", random.Random(0), 0
    # two of the longest waits end before the run does, however fast this machine and what opens it are
    longest = read_lines(finished / "evaluations.jsonl")[-1]["seconds"] / 2
    for _ in range(12):
        # once the folder has its recipe there is a run to go on with, at whatever instant the kill comes
        process = forked(train, folder, (folder / "recipe.toml").exists())
        process.join(rng.uniform(0, longest) if kills < 6 else 120)
        if process.exitcode is None:
            assert process.pid
            os.kill(process.pid, signal.SIGKILL)
            process.join()
            kills += 1
        elif process.exitcode == 0:
            break
    assert process.exitcode == 0 and kills >= 2
    assert contents(folder) == contents(finished)


def test_going_on_in_another_process_is_going_on(finished, tmp_path):
    folder = tmp_path / "run"
    Trainer(quick(folder, "rollouts=2")).run()
    trainer = Trainer(open_run(folder, ["rollouts=4"]), resume=folder)
    assert trainer.clock.step == 2
    trainer.run()
    assert contents(folder)[2:] == contents(finished)[2:]


def test_ctrl_c_saves_and_the_run_goes_on_to_the_same_bits(finished, tmp_path):
    folder = tmp_path / "run"
    trainer = Trainer(quick(folder, *LONGER, "checkpoint.every=100"))
    log = trainer._log

    def log_and_interrupt(*args):
        log(*args)
        trainer.interrupted = trainer.clock.step == 3

    trainer._log = log_and_interrupt
    assert trainer.run() is None
    assert checkpoint.newest(folder).step == 3
    Trainer(open_run(folder, []), resume=folder).run()
    assert contents(folder) == contents(finished)


@pytest.mark.parametrize("damage", ["truncate", "flip", "state"])
def test_a_torn_checkpoint_is_passed_over_for_the_one_before(finished, tmp_path, damage):
    folder = tmp_path / "run"
    shutil.copytree(finished, folder)
    newest = folder / "checkpoints" / "step-000004"
    if damage == "truncate":
        os.truncate(newest / "current.safetensors", 1000)
    elif damage == "flip":
        data = bytearray((newest / "optimizer.safetensors").read_bytes())
        data[-5] ^= 1
        (newest / "optimizer.safetensors").write_bytes(data)
    else:
        (newest / "state.json").write_text('{"form')
    with pytest.warns(UserWarning, match="damaged"):
        trainer = Trainer(open_run(folder, []), resume=folder)
    assert trainer.clock.step == 3
    trainer.run()
    assert contents(folder) == contents(finished)


def test_a_full_disk_is_one_line_and_costs_no_checkpoint(finished, tmp_path, monkeypatch):
    folder = tmp_path / "run"
    trainer = Trainer(quick(folder, *LONGER))
    save_file, calls = checkpoint.save_file, []

    def full(tensors, path):
        calls.append(path)
        if len(calls) > 9:  # in the midst of the third checkpoint
            raise OSError(28, "No space left on device")
        save_file(tensors, path)

    monkeypatch.setattr(checkpoint, "save_file", full)
    with pytest.raises(UserError, match="No space left") as caught:
        trainer.run()
    assert "\n" not in str(caught.value)
    assert sorted(path.name for path in (folder / "checkpoints").iterdir()) == ["step-000000", "step-000001"]
    monkeypatch.undo()
    Trainer(open_run(folder, []), resume=folder).run()
    assert contents(folder) == contents(finished)


def test_every_role_and_clock_comes_back(finished, tmp_path):
    finished = shutil.copytree(finished, tmp_path / "run")
    trainer = Trainer(open_run(finished, ["rollouts=5"]), resume=finished)
    saved = checkpoint.newest(finished)
    assert saved is not None
    for role in ROLES:
        ours = trainer.policy.state(role)
        assert all(torch.equal(ours[name], saved.tensors[role][name]) for name in ours)
    assert trainer.method.updates["current"].count == 8
    assert trainer.clock.network_evaluations == read_lines(finished / "metrics.jsonl")[-1]["network_evaluations"]


@pytest.mark.parametrize(
    ("overrides", "said"),
    [(["optimizer.lr=1"], "can't change"), (["rollouts=0"], "rollouts")],
)
def test_a_resumed_run_refuses_what_would_make_it_another(finished, overrides, said):
    with pytest.raises(UserError, match=said):
        open_run(finished, overrides)


def test_a_folder_that_is_no_run_and_a_run_of_another_recipe_are_refused(finished, tmp_path):
    with pytest.raises(UserError, match="not a run"):
        open_run(tmp_path, [])
    with pytest.raises(UserError, match=r"another recipe.*rollout"):
        open_run(finished, [], quick(finished, *LONGER, "rollout.steps=5"))


def test_a_new_run_never_writes_over_an_old_one(finished):
    with pytest.raises(UserError, match=r"not empty.*--resume"):
        Trainer(quick(finished, *LONGER))


def test_without_one_readable_checkpoint_nothing_is_taken_back(finished, tmp_path):
    folder = shutil.copytree(finished, tmp_path / "run")
    for state in folder.glob("checkpoints/*/state.json"):
        state.write_text("{")
    with pytest.raises(UserError, match="none of its 2 checkpoints"):
        Trainer(open_run(folder, []), resume=folder)
    assert len(read_lines(folder / "metrics.jsonl")) == 4


def test_a_resumed_run_remembers_its_new_length_and_refuses_to_go_back(finished, tmp_path):
    folder = shutil.copytree(finished, tmp_path / "run")
    with pytest.raises(UserError, match="already at rollout 4"):
        Trainer(open_run(folder, ["rollouts=3"]), resume=folder)
    Trainer(open_run(folder, ["rollouts=6"]), resume=folder)
    assert open_run(folder, []).rollouts == 6


def test_a_kill_in_the_midst_of_a_write_is_put_right(finished, tmp_path):
    folder = shutil.copytree(finished, tmp_path / "run")
    (folder / "lora").rename(folder / ".lora.123.old")
    (folder / "checkpoints" / ".step-000005.123.tmp").mkdir()
    (folder / ".report.html.123.tmp").write_text("half")
    trainer = Trainer(open_run(folder, []), resume=folder)
    assert (folder / "lora" / "pytorch_lora_weights.safetensors").is_file()
    assert temporaries(folder) == []
    trainer.run()
    assert contents(folder) == contents(finished)


def test_captions_are_encoded_alike_whatever_was_encoded_before():
    from flowtilt.models.opening import load_pipeline
    from flowtilt.models.sd3 import SD3

    texts = ["a cross", "two red triangles", "a red circle left of a green square", "a blue square"]

    def model():
        return SD3(load_pipeline("playground", revision=None, dtype="float32", device=torch.device("cpu")))

    together, apart = model(), model()
    whole = together.encode(texts).tensors()["encoder_hidden_states"]
    for k, text in reversed(list(enumerate(texts))):
        assert torch.equal(apart.encode([text]).tensors()["encoder_hidden_states"][0], whole[k])


def test_nothing_temporary_is_left_behind(finished):
    assert temporaries(finished) == []
    assert files.read_lines(finished / "nothing.jsonl") == []
    assert time.time() > (finished / "report.html").stat().st_mtime
