"""Runs that go wrong, from their first rollout to the guard's line in the run's folder."""

import shutil

import pytest
import torch
from conftest import quick

from flowtilt import Trainer
from flowtilt.io.files import append_line, read_lines
from flowtilt.runs.folder import open_run
from flowtilt.sampling.sampler import Sampler, decode
from flowtilt.seeding import noise
from flowtilt.training.image_metrics import image_features, image_metrics

BRIGHT = """
def bright(images, prompts):
    return images.mean((1, 2, 3))
"""


def fired(run):
    return {record["guard"]: record for record in read_lines(run / "guards.jsonl")}


def test_a_reward_that_pays_for_light_instead_of_the_caption_is_found_out(tmp_path):
    (tmp_path / "mine.py").write_text(BRIGHT)
    run = tmp_path / "run"
    mine = ["rewards.playground=0", f"rewards.mine={tmp_path}/mine.py:bright", "evaluate.rewards=['playground_strict']"]
    hacked = ["rollouts=8", "optimizer.lr=1e-2", "rollout.prompts=6", "rollout.images_per_prompt=6", "rollout.steps=3"]
    hacked += ["objective.times_per_image=1", "evaluate.every=8", "evaluate.images=80", "evaluate.steps=4"]
    Trainer(quick(run, *mine, *hacked, "checkpoint.every=100", whole=True)).run()
    found, records, evaluations = fired(run), read_lines(run / "metrics.jsonl"), read_lines(run / "evaluations.jsonl")
    assert records[-1]["reward/mine"] > records[0]["reward/mine"] and evaluations[-1]["score"] < evaluations[0]["score"]
    assert found["held_out"]["rollout"] == 8 and "playground_strict fell" in found["held_out"]["message"]
    assert "held_out" in (run / "report.html").read_text()


def test_a_multiplier_that_is_too_large_is_seen_in_the_velocities_before_the_run_ends(tmp_path):
    run = tmp_path / "run"
    settings = [
        "objective.type=ram",
        "objective.times_per_image=2",
        "advantage=none",
        "objective.multiplier=500",
        "optimizer.lr=0.01",
        "rollout.prompts=4",
        "rollouts=8",
        "guards=stop",
    ]
    trainer = Trainer(quick(run, *settings, "evaluate.every=0", "checkpoint.every=100", whole=True))
    assert trainer.run() is None and trainer.stopped_by
    found = fired(run)
    assert {"norm_ratio", "kl"} & set(found) and all("objective.multiplier" in record["message"] for record in found.values())
    assert trainer.clock.step < 8 and (run / "checkpoints" / f"step-{trainer.clock.step:06d}").is_dir()


def test_updates_that_are_all_clipped_are_told(tmp_path):
    run = tmp_path / "run"
    settings = ["objective.type=grpo", "objective.clip_range=1e-9", "objective.kl=0", "optimizer.lr=0.01", "rollouts=3", "evaluate.every=0"]
    Trainer(quick(run, *settings, whole=True)).run()
    assert list(fired(run)) == ["clipped"]


def test_a_held_out_reward_that_falls_in_an_evaluation_can_stop_the_run(tmp_path, monkeypatch):
    trainer = Trainer(quick(tmp_path / "run", "rollouts=8", "evaluate.rewards=['playground_strict']", "guards=stop", whole=True))
    monkeypatch.setattr(
        trainer.guards, "check_evaluation", lambda means, stds, images: {"held_out": "fell"} if trainer.clock.step == 4 else {}
    )
    assert trainer.run() is None
    assert trainer.clock.step == 4 and trainer.stopped_by == "fell" and fired(tmp_path / "run")["held_out"]["rollout"] == 4


def test_guards_that_are_off_look_at_nothing(tmp_path):
    run = tmp_path / "run"
    settings = ["objective.old_policy=copy", "optimizer.steps_per_rollout=1", "evaluate.every=0", "rollouts=3", "guards=off"]
    trainer = Trainer(quick(run, *settings, whole=True))
    assert trainer.run() is not None
    assert not (run / "guards.jsonl").exists() and trainer.guards.state == type(trainer.guards)(trainer.recipe).state


def test_the_images_that_are_measured_are_those_of_the_rollout(tmp_path):
    """Drawn anew by hand, they give the logged figures."""
    recipe = quick(tmp_path / "run", "rollouts=1", "evaluate.every=0", whole=True)
    trainer = Trainer(recipe)
    prompts = trainer.walk.take(0, recipe.rollout.prompts)
    each, number = recipe.rollout.images_per_prompt, recipe.rollout.prompts * recipe.rollout.images_per_prompt
    start = noise(recipe.seed, "rollout", [(1, i // each, i % each) for i in range(number)], trainer.policy.model.latent_shape)
    given = trainer.policy.model.encode([p.text for p in prompts for _ in range(each)])
    r = recipe.rollout
    latents = Sampler(r.solver, r.steps, r.guidance)(trainer.policy, "old", start, given, number)
    expected = image_metrics(image_features(decode(trainer.policy, latents, number)), torch.arange(number) // each)
    trainer.run()
    logged = read_lines(tmp_path / "run" / "metrics.jsonl")[0]
    assert {name: logged[name] for name in expected} == pytest.approx(expected)


def test_guards_go_on_where_a_run_was_interrupted(tmp_path):
    """Two rollouts without contrast before the interruption and one after it make three."""
    run = tmp_path / "run"
    settings = ["objective.old_policy=copy", "optimizer.steps_per_rollout=1", "evaluate.every=0"]
    Trainer(quick(run, *settings, "rollouts=2", whole=True)).run()
    assert not fired(run)
    Trainer(quick(run, *settings, "rollouts=3", whole=True), resume=run).run()
    assert fired(run)["no_contrast"]["rollout"] == 3


def test_a_guard_that_was_to_stop_a_run_does_so_where_a_kill_came_first(finished, tmp_path):
    run = shutil.copytree(finished, tmp_path / "run")
    step = read_lines(run / "metrics.jsonl")[-1]["rollout"]
    append_line(run / "guards.jsonl", {"rollout": step, "guard": "held_out", "message": "it falls", "stops": True})
    overrides = [f"rollouts={step + 1}", "guards=stop"]
    trainer = Trainer(open_run(run, overrides), resume=run)
    assert trainer.run() is None and trainer.stopped_by == "it falls" and len(read_lines(run / "metrics.jsonl")) == step
    again = Trainer(open_run(run, overrides), resume=run)  # on purpose
    again.run()
    assert len(read_lines(run / "metrics.jsonl")) == step + 1
