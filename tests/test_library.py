"""flowtilt call by call: the README's ten lines, what each part returns, and what it refuses."""

import contextlib
import io
import runpy
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import two_blocks
from test_docs import ROOT, blocks

import flowtilt as ft
from flowtilt.cli import main
from flowtilt.io.files import read_lines
from flowtilt.objectives import ForwardProcess
from flowtilt.runs import checkpoint

FOUR = {"solver": "euler", "steps": 4}


def red(images, prompts):
    return images[:, 0].mean((1, 2))


@pytest.fixture
def policy():
    return ft.load_policy(two_blocks().partition("=")[2], lora_rank=4)


PROMPTS = ["a red circle", "a blue square", "two green crosses"]


def test_the_readmes_ten_lines_run_as_they_stand(tmp_path):
    (code,) = (code for code in blocks(ROOT / "README.md", "python") if "load_policy" in code)
    done = subprocess.run(
        [sys.executable, "-W", "error::UserWarning", "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr
    assert not done.stderr and "'loss'" in done.stdout
    assert (tmp_path / "mine" / "pytorch_lora_weights.safetensors").is_file() and (tmp_path / "red.png").is_file()


def test_the_mean_of_the_trained_reward_rises(policy):
    learner = ft.Learner(policy, ft.NFT(beta=1.0), lr=1e-2)
    means = []
    for step in range(30):
        batch = policy.sample(PROMPTS, 6, seed=step, **FOUR)
        reward = ft.score(red, batch)["red"]
        means.append(float(reward.mean()))
        metrics = learner.step(batch, ft.group_advantages(reward, batch.groups))
    assert metrics["loss"] > 0 and learner.steps == 30
    assert sum(means[-5:]) > sum(means[:5])


def test_samples_depend_on_seed_and_place_alone(policy):
    batch = policy.sample(PROMPTS, 2, seed=3, **FOUR)
    assert batch.images.shape == (6, 3, 32, 32) and len(batch.latents) == len(batch) == 6
    assert batch.groups.tolist() == [0, 0, 1, 1, 2, 2] and [p.text for p in batch.prompts[::2]] == PROMPTS
    assert torch.equal(policy.sample(PROMPTS, 2, seed=3, **FOUR).images, batch.images)
    policy.micro_batch.sizes["sample"] = 1
    torch.testing.assert_close(policy.sample(PROMPTS, 2, seed=3, **FOUR).latents, batch.latents, atol=1e-5, rtol=1e-5)
    assert not torch.equal(policy.sample(PROMPTS, 2, seed=4, **FOUR).images, batch.images)


def test_an_untrained_policy_samples_what_the_base_samples(policy):
    ours, base = (policy.sample("a red circle", role=role, **FOUR).images for role in ("old", "reference"))
    assert torch.equal(ours, base)


def test_a_method_on_kept_steps_trains_on_samples_that_kept_them(policy):
    objective = ft.GRPO(window="random", window_size=2)
    learner = ft.Learner(policy, objective, lr=1e-3)
    for step in range(2):
        batch = policy.sample(PROMPTS, 3, seed=step, keep=objective, **FOUR)
        assert batch.path is not None and len(batch.path.steps) == 2
        metrics = learner.step(batch, ft.group_advantages(ft.score(red, batch)["red"], batch.groups))
    assert metrics["grad_norm"] > 0


def test_what_is_saved_samples_as_the_average_did(policy, tmp_path):
    learner = ft.Learner(policy, ft.NFT(kl=0.0), lr=1e-2)
    batch = policy.sample(PROMPTS, 4, seed=0, **FOUR)
    learner.step(batch, ft.group_advantages(ft.score(red, batch)["red"], batch.groups))
    policy.save_lora(str(tmp_path / "lora"))
    again = ft.load_policy(two_blocks().partition("=")[2], lora_rank=4, base_loras=[tmp_path / "lora"])
    tuned, saved = (it.sample(PROMPTS, role=role, **FOUR).latents for it, role in ((policy, "ema"), (again, "reference")))
    torch.testing.assert_close(tuned, saved, atol=1e-5, rtol=1e-5)
    assert not torch.equal(tuned, policy.sample(PROMPTS, role="reference", **FOUR).latents)


def test_all_weights_are_trained_and_saved_as_the_average_has_them(tmp_path):
    policy = ft.load_policy(two_blocks().partition("=")[2], train="full")
    batch = policy.sample(PROMPTS, 4, seed=0, **FOUR)
    assert torch.equal(batch.latents, policy.sample(PROMPTS, 4, seed=0, role="reference", **FOUR).latents)
    learner = ft.Learner(policy, ft.NFT(kl=0.0), lr=1e-3)
    assert learner.step(batch, ft.group_advantages(ft.score(red, batch)["red"], batch.groups))["grad_norm"] > 0
    policy.save(str(tmp_path / "network"))
    again = type(policy.model.network).from_pretrained(tmp_path / "network").state_dict()
    base, average = policy.model.network.state_dict(), policy.state("ema")
    assert all(torch.equal(again[name], x) for name, x in average.items())
    assert sum(not torch.equal(base[name], x) for name, x in average.items()) > len(average) / 2


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda p: p.sample([]), "sample: no prompts"),
        (lambda p: p.sample("a", solver="eulr"), "sample: solver: "),
        (lambda p: p.sample("a", steps=0), "sample: steps: "),
        (lambda p: p.sample("a", role="critic", **FOUR), "no role 'critic'; there are current, old, ema"),
        (lambda p: ft.score(red, torch.zeros(2, 3, 8, 8), ["one"]), "score: 1 prompts for 2 images"),
        (lambda p: ft.score("pickscor", p.sample("a", **FOUR)), "did you mean 'pickscore'"),
        (lambda p: ft.Learner(p, ft.NFT(), lr=-1.0), "Learner: lr: "),
        (lambda p: ft.Learner(p, ft.NFT(), weigth_decay=1.0), "Learner: weigth_decay: "),
        (lambda p: (ft.Learner(p, ft.NFT()), ft.Learner(p, ft.NFT())), "this policy has a learner already"),
        (lambda p: ft.Learner(p, ft.NFT()).step(p.sample("a", 2, **FOUR), torch.zeros(3)), r"advantages are \[3\], but there are 2 images"),
        (lambda p: ft.Learner(p, ft.NFT()).step(p.sample("a", 2, **FOUR), torch.full((2,), torch.nan)), "no image has an advantage"),
        (lambda p: ft.Learner(p, ft.GRPO()).step(p.sample("a", 2, **FOUR), torch.ones(2)), "trains kept steps; sample with keep=objective"),
        (lambda p: ft.Learner(p, ft.NFT(times_per_image=9)).step(p.sample("a", 2, **FOUR), torch.ones(2)), "lower times_per_image"),
        (lambda p: ft.Learner("playground", ft.NFT()), "Learner: want a policy of load_policy, not str"),
        (lambda p: ft.Learner(p, ft.NFT), "Learner: want a method with its settings, such as NFT"),
        (lambda p: ft.load_policy("nowhere"), "model nowhere"),
        (lambda p: ft.load_policy("playground", train="all"), 'load_policy: train must be "lora" or "full"'),
        (lambda p: ft.load_policy("playground", train="full", base_loras=["x"]), "base_loras is for a trained LoRA"),
        (lambda p: ft.load_policy("playground", resolutoin=32), "load_policy: resolutoin: "),
    ],
)
def test_what_is_wrong_is_one_line(policy, call, message):
    with pytest.raises(ft.UserError, match=message) as told:
        call(policy)
    assert "\n" not in str(told.value)


def test_a_learner_can_be_made_again_once_the_first_is_closed(policy):
    first = ft.Learner(policy, ft.NFT())
    first.close()
    ft.Learner(policy, ft.NFT())
    with pytest.raises(ft.UserError, match="this learner is closed"):
        first.step(policy.sample("a red circle", 2, **FOUR), torch.ones(2))


# the trainer -----------------------------------------------------------------------------------------


SMALL = {
    "steps": 3,
    "rollout": {"prompts": 3, "images_per_prompt": 3, "steps": 3},
    "objective": {"times_per_image": 1},
    "optimizer": {"steps_per_rollout": 1},
    "evaluate": {"every": 0, "images": 6, "steps": 2, "samples": 2},
    "lora": {"rank": 4},
}


@pytest.fixture
def small(tmp_path):
    """The keys of a run of half a second on half of the playground's network."""
    return {**SMALL, "model": two_blocks().partition("=")[2], "run": str(tmp_path / "run")}


def test_rewards_are_callables_and_the_callback_sees_metrics_and_images(small, tmp_path, capsys):
    seen = []
    rewards = {"red": lambda images, prompts: images[:, 0].mean((1, 2)), "playground": 0.5}
    trainer = ft.Trainer("playground", rewards=rewards, on_rollout=lambda metrics, images: seen.append((metrics, images)), **small)
    summary = trainer.run()
    assert summary["rollouts"] == 3 and summary["protocol"].startswith("red,")
    assert [metrics["rollout"] for metrics, _ in seen] == [1, 2, 3] and {"reward/red", "reward/playground"} <= seen[0][0].keys()
    preview = seen[-1][1]
    assert preview.images.shape == (8, 3, 32, 32) and len(preview.prompts) == 8 and preview.rollout == 3
    torch.testing.assert_close(preview.scores["red"], preview.images[:, 0].mean((1, 2)))
    assert preview.png().startswith(b"\x89PNG")
    said = capsys.readouterr().err
    assert said.count("resumes only in Python: Trainer(resume=") == 1 and "rewards={'red': ...}" in said


def test_a_function_of_a_file_is_named_by_its_file_and_resumes_anywhere(small, tmp_path, capsys):
    ft.Trainer("playground", rewards=red, **small | {"steps": 1}).run()
    assert f'red = "{Path(__file__)}:red"' in (tmp_path / "run" / "recipe.toml").read_text()
    assert main(["train", "--resume", small["run"], "rollouts=2"]) == 0
    assert "only in Python" not in capsys.readouterr().err


def test_a_run_driven_rollout_by_rollout_is_the_run_of_one_call(small, tmp_path):
    whole = ft.Trainer({"base": "playground", **small})
    whole.run()
    trainer = ft.Trainer({"base": "playground", **small, "run": str(tmp_path / "steps")})
    rewards = [trainer.rollout()["reward/total"]] + [metrics["reward/total"] for metrics in trainer]
    assert rewards == [line["reward/total"] for line in read_lines(tmp_path / "run" / "metrics.jsonl")]
    assert trainer.done and trainer.clock.step == 3
    for name in ("summary.json", "report.html", "evaluations.jsonl", "lora"):
        assert (tmp_path / "steps" / name).exists()
    ours, theirs = (checkpoint.newest(tmp_path / run).tensors["current"] for run in ("steps", "run"))
    assert all(torch.equal(value, theirs[name]) for name, value in ours.items())
    for go_on in (trainer.rollout, lambda: list(trainer)):
        with pytest.raises(ft.UserError, match="nothing is left to train, the run is at rollout 3"):
            go_on()


def test_a_loop_that_is_left_saves_and_the_run_goes_on_with_its_object(small, tmp_path):
    rewards = {"red": lambda images, prompts: images[:, 0].mean((1, 2))}
    for metrics in ft.Trainer("playground", rewards=rewards, **small):
        if metrics["rollout"] == 2:
            break
    assert checkpoint.newest(tmp_path / "run").step == 2
    with pytest.raises(ft.UserError, match=r"rewards.red: is a Python object, which no file holds; give it again: Trainer\(resume="):
        ft.Trainer(resume=small["run"])
    with pytest.raises(ft.UserError, match=r"rewards\.rde: the run has no such reward; did you mean 'red'"):
        ft.Trainer(resume=small["run"], rewards={"rde": red})
    assert "trained with a Python object" in complaint(main, "evaluate", "--lora", small["run"], "--images", "2")
    trainer = ft.Trainer(resume=small["run"], rewards=rewards, rollouts=4)
    assert trainer.clock.step == 2 and trainer.run()["rollouts"] == 4


def test_ctrl_c_saves_after_the_rollout_and_stops_the_cell(small, tmp_path):
    trainer = ft.Trainer("playground", on_rollout=lambda metrics, images: signal.raise_signal(signal.SIGINT), **small)
    with pytest.raises(KeyboardInterrupt, match="saved after 1 rollouts; go on with: Trainer\\(resume="):
        for _ in trainer:
            pass
    assert checkpoint.newest(tmp_path / "run").step == 1
    assert trainer.run() is None and trainer.clock.step == 2  # once more
    assert checkpoint.newest(tmp_path / "run").step == 2


def test_what_a_callback_raises_ends_the_run_after_a_checkpoint(small, tmp_path):
    def fail(metrics, images):
        raise ZeroDivisionError

    trainer = ft.Trainer("playground", on_rollout=fail, **small)
    with pytest.raises(ZeroDivisionError):
        trainer.run()
    assert checkpoint.newest(tmp_path / "run").step == 1
    with pytest.raises(ZeroDivisionError):
        trainer.rollout()
    assert checkpoint.newest(tmp_path / "run").step == 2


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda s: ft.Trainer(), "Trainer: which recipe"),
        (lambda s: ft.Trainer("playgruond"), "did you mean 'playground'"),
        (lambda s: ft.Trainer(3), "recipe: want a name, a .toml file, a dict or a Recipe, not int"),
        (lambda s: ft.Trainer("playground", rolouts=3), r"rolouts: unknown key; did you mean 'rollouts'\? \[Python\]"),
        (lambda s: ft.Trainer({"base": "playground", "rollout": {"promts": 3}}), "did you mean 'rollout.prompts'"),
        (lambda s: ft.Trainer("playground", rewards=[red]), "rewards: want a dict of rewards by name"),
        (lambda s: ft.Trainer("playground", rewards={"red": None}), "rewards.red: want a callable"),
        (lambda s: ft.Trainer("playground", rewards={}), "rewards: "),
        (lambda s: ft.Trainer("playground", **s | {"rewards": {"red": lambda images, prompts: images}}), "reward red: "),
        (lambda s: ft.Trainer("playground", **s | {"objective": Notebook()}), "objective: Notebook was defined in Python, not in a file"),
        (lambda s: (ft.Trainer("playground", **s).close(), ft.Trainer("playground", **s)), "run: not empty; go on with"),
        (lambda s: (kept.append(ft.Trainer("playground", **s)), ft.Trainer(resume=s["run"])), "held by a training run of this very"),
        (lambda s: ft.Trainer(resume="nowhere"), "nowhere: not a run"),
        (lambda s: (ft.Trainer("playground", **s).close(), ft.Trainer(resume=s["run"], seed=1)), "override seed: a resumed run can't"),
        (lambda s: (ft.Trainer("playground", **s).close(), ft.Trainer("playground", s["run"], **s | {"seed": 1})), "another recipe .seed "),
    ],
)
def test_what_a_trainer_can_not_do_is_one_line(small, call, message):
    with pytest.raises(ft.UserError, match=message) as told:
        call(small)
    assert "\n" not in str(told.value)
    while kept:
        kept.pop().close()


kept: list[ft.Trainer] = []
Notebook = type("Notebook", (ForwardProcess,), {"sample_loss": lambda self, at, batch: at.v.mean(), "__module__": "__main__"})


def complaint(main, *words):
    """The one line that a mistaken command ends in."""
    with contextlib.redirect_stderr(io.StringIO()) as err:
        assert main(list(words)) == 2
    return err.getvalue().strip().splitlines()[-1]


def test_the_example_runs_and_its_lora_is_written(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["minimal.py", "--rollouts", "1", "--prompts", "6", "--images", "4", "--test", "6"])
    runpy.run_path(str(Path(ROOT) / "examples" / "minimal.py"), run_name="__main__")
    assert "after:  test score" in capsys.readouterr().out
    assert (tmp_path / "minimal" / "pytorch_lora_weights.safetensors").is_file() and (tmp_path / "minimal" / "samples.png").is_file()
