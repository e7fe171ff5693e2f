"""flowtilt call by call: the README's ten lines, what each part returns, and what it refuses."""

import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import two_blocks
from test_docs import ROOT, blocks

import flowtilt as ft

FOUR = {"solver": "euler", "steps": 4}


def red(images, prompts):
    return images[:, 0].mean((1, 2))


@pytest.fixture
def policy():
    return ft.load_policy(two_blocks().partition("=")[2], lora_rank=4)


PROMPTS = ["a red circle", "a blue square", "two green crosses"]


def test_the_readmes_ten_lines_run_as_they_stand(tmp_path):
    (code,) = (code for code in blocks(ROOT / "README.md", "python") if "load_policy" in code)
    code = code.replace(".show()", ".save('circle.png')")
    done = subprocess.run(
        [sys.executable, "-W", "error::UserWarning", "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr
    assert not done.stderr and "'loss'" in done.stdout
    assert (tmp_path / "mine" / "pytorch_lora_weights.safetensors").is_file() and (tmp_path / "circle.png").is_file()


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
        (lambda p: ft.load_policy("nowhere"), "model nowhere"),
        (lambda p: ft.load_policy("playground", resolutoin=32), "load_policy: resolutoin: "),
    ],
)
def test_what_is_wrong_is_one_line(policy, call, message):
    with pytest.raises(ft.UserError, match=message) as told:
        call(policy)
    assert "\n" not in str(told.value)


def test_a_learner_can_be_made_again_once_the_first_is_closed(policy):
    ft.Learner(policy, ft.NFT()).close()
    ft.Learner(policy, ft.NFT())


def test_the_example_runs_and_its_lora_is_written(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["minimal.py", "--rollouts", "1", "--prompts", "6", "--images", "4", "--test", "6"])
    runpy.run_path(str(Path(ROOT) / "examples" / "minimal.py"), run_name="__main__")
    assert "after:  test score" in capsys.readouterr().out
    assert (tmp_path / "minimal" / "pytorch_lora_weights.safetensors").is_file() and (tmp_path / "minimal" / "samples.png").is_file()
