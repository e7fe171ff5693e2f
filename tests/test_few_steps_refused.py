"""What RTDMD's recipes can't do: one line that names the key, exit status 2, and nothing is written."""

import json
import shutil

import pytest
import torch
from few_steps import TINY, cold, rl

from flowtilt import Trainer
from flowtilt.cli import main
from flowtilt.lora import Lora
from flowtilt.lora.read import read_lora
from flowtilt.lora.write import to_diffusers


@pytest.fixture(scope="module")
def parent(tmp_path_factory):
    """The weights of a distillation that has not begun."""
    folder = tmp_path_factory.mktemp("runs") / "cold"
    trainer = Trainer(cold(folder))
    trainer.save()
    return folder


def refusal(recipe, run, capsys, *overrides):
    """The line; the run's folder must not come to be."""
    assert main(["train", recipe, *TINY, "rollouts=1", f"run={run}", *overrides]) == 2
    said = capsys.readouterr().err.rstrip("\n")
    assert "\n" not in said.removeprefix("flowtilt: ") and said.startswith("flowtilt: ") and not run.exists()
    return said


COLD, RL, NFT = "playground-rtdmd-cold", "playground-rtdmd-rl", "playground-fewstep-nft"
WRONG = [
    (COLD, ["rewards.playground=1"], "rewards.playground: acdmd trains on no reward; give it the weight 0"),
    (COLD, ["rollout.solver=euler"], 'rollout.solver: acdmd trains the steps of "cps", not those of "euler"'),
    (RL, ["rollout.solver=dpm2"], 'rollout.solver: rtdmd trains the steps of "cps", not those of "dpm2"'),
    (COLD, ["rollout.guidance=4.5"], "rollout.guidance: a student of acdmd samples without guidance"),
    (RL, ["rollout.guidance=2"], "rollout.guidance: a student of rtdmd samples without guidance"),
    (COLD, ["shard=base"], 'shard: acdmd does not go with "base" yet'),
    (COLD, ["optimizer.steps_per_rollout=2"], "optimizer.steps_per_rollout: acdmd makes one update of the student a step"),
    (COLD, ['lora.on=["runs/other"]'], "lora.on: acdmd distils the base itself"),
    (COLD, ["objective.trained_steps=2"], "objective.trained_steps: belongs to objective.type = 'rtdmd', not 'acdmd'"),
    (COLD, ["objective.kl=0.1"], "objective.kl: belongs to objective.type = "),
    (COLD, ["objective.fake_updates=0"], "objective.fake_updates: must be greater than or equal to 1, not 0"),
    (COLD, ["objective.consistency_span=2"], "objective.consistency_span: must be less than or equal to 1, not 2"),
    (RL, ["objective.trained_steps=4"], "objective.trained_steps: of 4 steps 3 are stochastic and can be trained, not 4"),
    (RL, ["rollout.steps=2"], "objective.trained_steps: of 2 steps 1 are stochastic and can be trained, not 2"),
    (RL, ["objective.trained_steps=0"], "objective.trained_steps: must be greater than or equal to 1, not 0"),
    (RL, ["objective.clip_range=0"], "objective.clip_range: must be greater than 0, not 0"),
    (RL, ["objective.backprop={playground_smoth=1.0}"], "'playground_smoth' is not in [rewards]; did you mean 'playground_smooth'?"),
    (RL, ["objective.backprop={hpsv2=1.0}"], "objective.backprop: 'hpsv2' is not in [rewards]; add it there, with the weight 0"),
    (RL, ["rewards.playground=0"], "rewards: every weight is 0"),
    (RL, ["rollout.images_per_prompt=1"], "rollout.images_per_prompt: rewards are compared within a prompt's images, so it takes 2"),
    (NFT, ["rollout.images_per_prompt=1"], "rollout.images_per_prompt: rewards are compared within a prompt's images, so it takes 2"),
]


@pytest.mark.parametrize(("recipe", "overrides", "message"), WRONG)
def test_a_recipe_that_no_method_could_follow_is_refused(recipe, overrides, message, tmp_path, capsys):
    assert message in refusal(recipe, tmp_path / "run", capsys, *overrides)


@pytest.mark.parametrize("recipe", [RL, NFT])
def test_without_its_cold_start_a_recipe_says_how_to_make_it(recipe, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    said = refusal(recipe, tmp_path / "run", capsys)
    assert said == (
        "flowtilt: lora.on: there is no runs/playground-rtdmd-cold; make it with `flowtilt train playground-rtdmd-cold`, or name another"
    )


def test_a_place_that_is_no_recipes_name_is_told_as_any_lora(tmp_path, capsys):
    said = refusal(RL, tmp_path / "run", capsys, f"lora.on=['{tmp_path}/elsewhere']")
    assert said == f"flowtilt: lora.on: lora {tmp_path}/elsewhere: no such file or folder"


def test_a_reward_without_a_gradient_cannot_be_followed(parent, tmp_path, capsys):
    said = refusal(RL, tmp_path / "run", capsys, on(parent), "objective.backprop={playground=1.0}")
    assert "reward playground: has no gradient to the images; built in are clipscore, hpsv2" in said


def on(place):
    return f"lora.on={json.dumps([str(place)])}"


@pytest.mark.parametrize("steps", [18, 60])
def test_steps_that_end_where_no_times_are_left_to_noise_to_are_refused_before_training(steps, tmp_path, capsys):
    """With the playground's shift of 2 the first level is 2 (S - 1) / (2 S - 1), below .97 up to 17 steps."""
    said = refusal(COLD, tmp_path / "run", capsys, f"rollout.steps={steps}")
    first = 2 * (steps - 1) / (2 * steps - 1)
    assert f"rollout.steps: the first of {steps} steps ends at noise level {first:.3f}, and a fake score learns only below 0.97" in said
    Trainer(cold(tmp_path / "fits", "rollout.steps=17"))


def test_a_fake_score_that_is_not_there_or_of_another_base_is_refused(parent, tmp_path, capsys):
    bare = tmp_path / "bare"
    shutil.copytree(parent / "lora", bare)
    said = refusal(RL, tmp_path / "run", capsys, on(bare))
    assert f"objective.fake: lora {bare}/fake: no such file or folder; name the fake/ of a distillation's run" in said
    lora = read_lora(parent / "fake")
    smaller = {name: (a[:, :-1].contiguous(), b) for name, (a, b) in lora.layers.items()}
    to_diffusers(Lora(smaller, lora.alphas, "made here"), tmp_path / "other")
    said = refusal(RL, tmp_path / "run", capsys, on(parent), f"objective.fake={tmp_path}/other")
    assert "it belongs to another base" in said and f"{tmp_path}/other" in said


def test_another_fake_score_is_taken_where_it_is_named(parent, tmp_path):
    lora = read_lora(parent / "fake")
    moved = {name: (a, torch.full_like(b, 0.01)) for name, (a, b) in lora.layers.items()}
    to_diffusers(Lora(moved, lora.alphas, "made here"), tmp_path / "other")
    trainer = Trainer(rl(tmp_path / "run", parent, f"objective.fake={tmp_path}/other"))
    taken = trainer.method.base_loras["fake"]
    assert all(torch.equal(b * taken.scale(name), lora.scale(name) * moved[name][1]) for name, (_, b) in taken.layers.items())
