"""A run end to end on the playground: what it writes, and what its results must not depend on."""

import json
import tomllib

import pytest
import torch
from conftest import LONGER, quick
from diffusers import StableDiffusion3Pipeline
from safetensors.torch import load_file

from flowtilt import Trainer, UserError
from flowtilt.config import load_recipe
from flowtilt.io.files import read_lines
from flowtilt.models.sd3 import SD3
from flowtilt.objectives.batches import Pairs
from flowtilt.playground import pipeline_path
from flowtilt.policy.tuned_model import TunedModel
from flowtilt.sampling.sampler import Sampler, decode
from flowtilt.seeding import noise
from flowtilt.solvers import solve


def weights(run, role="current"):
    newest = sorted((run / "checkpoints").iterdir())[-1]
    return load_file(newest / f"{role}.safetensors")


def uniform(steps):
    """Levels before the shift, as `flow.sigma_schedule` has them; diffusers' own default ends lower."""
    return [1 - k / steps for k in range(steps)]


MORE = ["rollout.prompts=6", "rollout.images_per_prompt=4", "evaluate.steps=4"]
"""The rollouts that the bounds of rounding of two tests were found for; smaller ones leave less of a gradient, and round as much."""


def rewards(run):
    return [record["reward/total"] for record in read_lines(run / "metrics.jsonl")]


def test_a_run_leaves_everything_that_is_promised(finished):
    summary = json.loads((finished / "summary.json").read_text())
    assert summary["recipe"] == "playground" and summary["rollouts"] == 4 and summary["seed"] == 0
    assert set(summary["score"]) == {"before", "after"}
    metrics = read_lines(finished / "metrics.jsonl")
    assert [record["rollout"] for record in metrics] == [1, 2, 3, 4]
    assert {"reward/playground", "time/sample", "time/train", "time/other", "images_per_second"} <= metrics[0].keys()
    spent = sum(value for name, value in metrics[0].items() if name.startswith("time/"))
    assert spent == pytest.approx(metrics[0]["seconds"], rel=1e-6)
    assert [record["rollout"] for record in read_lines(finished / "evaluations.jsonl")] == [0, 2, 4]
    assert "<html" in (finished / "report.html").read_text()
    assert json.loads((finished / "environment.json").read_text())["packages"]["torch"]
    assert len(list((finished / "samples" / "step-000004").glob("*.png"))) == 4
    assert len(list((finished / "checkpoints").iterdir())) == 2  # checkpoint.keep


def test_the_resolved_recipe_trains_again_as_it_is(finished):
    tomllib.loads((finished / "recipe.toml").read_text())
    assert load_recipe(finished / "recipe.toml") == quick(finished, *LONGER)


def test_training_moves_the_policy_and_the_old_one_lags(finished):
    current, old, ema = (weights(finished, role) for role in ("current", "old", "ema"))
    moved = [name for name in current if not torch.equal(current[name], old[name])]
    assert moved and any(not torch.equal(current[name], ema[name]) for name in current)
    assert all(value.dtype == torch.float32 for value in current.values())


def test_plain_diffusers_loads_the_lora_and_draws_what_our_sampler_draws(tmp_path):
    # a trained LoRA of a few steps is small: enlarged, its alpha can't be lost unnoticed
    trainer = Trainer(quick(tmp_path / "run", "rollouts=1", whole=True))
    with torch.no_grad():
        for name, weight in trainer.policy._weights["ema"].items():
            if "lora_B" in name:
                weight.normal_(0, 0.2, generator=torch.Generator().manual_seed(len(name)))
    trainer.policy._version["ema"] = -1
    trainer.policy.save_lora(str(tmp_path / "lora"))
    pipeline = StableDiffusion3Pipeline.from_pretrained(pipeline_path())
    pipeline.set_progress_bar_config(disable=True)
    start = noise(0, "test", [(0,), (1,)], (8, 8, 8))
    texts = ["a red circle left of a blue square", "three green triangles"]

    def plain():
        return pipeline(texts, latents=start.clone(), sigmas=uniform(6), guidance_scale=1.0, max_sequence_length=1, output_type="pt").images

    base = plain()
    pipeline.load_lora_weights(str(tmp_path / "lora"))
    tuned = plain()
    given = trainer.policy.model.encode(texts)
    with torch.no_grad():
        latents = solve(lambda x, s: trainer.policy.velocity("ema", x, s, given), start, trainer.policy.model.levels(6), "euler")
        ours = trainer.policy.model.decode(latents)
    assert (tuned - base).abs().max() > 0.2
    torch.testing.assert_close(ours, tuned, atol=2e-4, rtol=0)


@pytest.mark.parametrize("guidance", [1.0, 4.5])
def test_our_sampler_is_the_pipelines_own(guidance):
    pipeline = StableDiffusion3Pipeline.from_pretrained(pipeline_path())
    pipeline.set_progress_bar_config(disable=True)
    start = noise(0, "test", [(0,), (1,)], (8, 8, 8))
    texts = ["two crosses", "a yellow square above a green circle"]
    theirs = pipeline(
        texts, latents=start.clone(), sigmas=uniform(5), guidance_scale=guidance, max_sequence_length=1, output_type="pt"
    ).images
    stack = TunedModel(SD3(pipeline), [])
    latents = Sampler("euler", 5, guidance)(stack, "base", start, stack.model.encode(texts), 2)
    ours = decode(stack, latents, 2)
    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=0)


def test_the_micro_batch_is_a_matter_of_memory_only(tmp_path):
    Trainer(quick(tmp_path / "whole", *LONGER, *MORE)).run()
    small = Trainer(quick(tmp_path / "small", *LONGER, *MORE, "micro_batch=5"))
    small.run()
    assert rewards(tmp_path / "small") == pytest.approx(rewards(tmp_path / "whole"), abs=1e-6)
    # gradients, not weights: Adam divides a rounding by itself where a gradient is near zero
    rng = torch.Generator().manual_seed(0)
    given = small.policy.model.encode(["a red circle", "two crosses"] * 6)
    x0, eps = (torch.randn(12, 8, 8, 8, generator=rng) for _ in range(2))
    advantages, t = torch.randn(12, generator=rng), torch.rand(12, generator=rng)
    batch = Pairs(x0, advantages, given, torch.arange(12), t, eps)
    found = []
    for size in (1, 5, 12):
        sums = small.method.learner._gradients(batch, 12, size)
        found.append([*(p.grad.clone() for p in small.policy.parameters), *sums.values()])
    for other in found[:-1]:
        for ours, whole in zip(other, found[-1], strict=True):
            torch.testing.assert_close(ours, whole, atol=1e-5 * float(whole.abs().max()) + 1e-9, rtol=0)


def test_seeds_differ_and_equal_seeds_repeat_to_the_bit(finished, tmp_path):
    Trainer(quick(tmp_path / "again", *LONGER)).run()
    Trainer(quick(tmp_path / "other", "seed=1", "rollouts=1")).run()
    assert rewards(tmp_path / "again") == rewards(finished)
    assert all(torch.equal(value, weights(finished)[name]) for name, value in weights(tmp_path / "again").items())
    assert rewards(tmp_path / "other")[0] != rewards(finished)[0]


def test_a_users_reward_and_prompts(tmp_path):
    (tmp_path / "mine.py").write_text("def brightness(images, prompts):\n    return images.mean((1, 2, 3))\n")
    (tmp_path / "prompts.txt").write_text("a red circle\na blue square\n")
    Trainer(
        quick(
            tmp_path / "run",
            "rollouts=1",
            "rollout.prompts=2",
            f"prompts={tmp_path}/prompts.txt",
            f"rewards.mine={tmp_path}/mine.py:brightness",
            "rewards.playground=0",
        )
    ).run()
    record = read_lines(tmp_path / "run" / "metrics.jsonl")[0]
    assert record["reward/total"] == pytest.approx(record["reward/mine"])
    assert 0 < record["reward/mine"] < 1


@pytest.mark.parametrize(
    ("body", "said"),
    [
        ("raise RuntimeError('no server')", "RuntimeError: no server"),
        ("return images.mean((1, 2, 3)) * float('nan')", "has no score (NaN) for any of the 12 images"),
        ("return images.mean((1, 2, 3)) / 0", "infinite"),
        ("return images.mean()", "shape [2]"),
        ("return {'score': 0.0}", "a float"),
    ],
)
def test_a_failing_reward_ends_the_run_and_is_never_a_zero(tmp_path, body, said):
    (tmp_path / "mine.py").write_text(f"def f(images, prompts):\n    {body}\n")
    recipe = quick(tmp_path / "run", "rewards.playground=0", f"rewards.mine={tmp_path}/mine.py:f")
    with pytest.raises(UserError, match="reward") as caught:
        Trainer(recipe).run()
    assert said in str(caught.value) and "\n" not in str(caught.value)
    assert read_lines(tmp_path / "run" / "metrics.jsonl") == []


def test_the_guards_warn_once_and_stop_with_a_checkpoint(tmp_path):
    (tmp_path / "mine.py").write_text("import torch\ndef f(images, prompts):\n    return torch.ones(len(images))\n")
    base = ["rewards.playground=0", f"rewards.mine={tmp_path}/mine.py:f", "rollouts=7", "evaluate.every=0", "checkpoint.every=100"]
    base += ["rollout.prompts=2", "rollout.images_per_prompt=2", "optimizer.steps_per_rollout=1"]
    Trainer(quick(tmp_path / "warned", *base, whole=True)).run()
    fired = read_lines(tmp_path / "warned" / "guards.jsonl")
    assert [record["guard"] for record in fired] == ["no_variance"]
    trainer = Trainer(quick(tmp_path / "stopped", *base, "guards=stop", whole=True))
    assert trainer.run() is None
    assert trainer.clock.step == 5 and (tmp_path / "stopped" / "checkpoints" / "step-000005").is_dir()


def test_no_contrast_is_noticed(tmp_path):
    settings = ["rollouts=4", "objective.old_policy=copy", "optimizer.steps_per_rollout=1", "evaluate.every=0"]
    Trainer(quick(tmp_path / "run", *settings, whole=True)).run()
    assert [record["guard"] for record in read_lines(tmp_path / "run" / "guards.jsonl")] == ["no_contrast"]


def test_a_gradient_that_is_not_finite_never_reaches_the_weights(tmp_path, monkeypatch):
    trainer = Trainer(quick(tmp_path / "run", "rollouts=1"))
    loss = type(trainer.method.learner.objective).loss

    def broken(self, policy, batch):
        value, metrics = loss(self, policy, batch)
        return value * float("nan"), metrics

    monkeypatch.setattr(type(trainer.method.learner.objective), "loss", broken)
    trainer.run()
    assert [record["guard"] for record in read_lines(tmp_path / "run" / "guards.jsonl")] == ["nan"]
    assert all(torch.isfinite(value).all() for value in weights(tmp_path / "run").values())


def test_a_run_can_start_from_another_runs_lora(finished, tmp_path):
    Trainer(quick(tmp_path / "run", "rollouts=1", f"lora.init={finished}")).run()
    began = read_lines(tmp_path / "run" / "evaluations.jsonl")[0]
    ended = read_lines(finished / "evaluations.jsonl")[-1]
    assert began["score"] == ended["score"] and began["by_tag"] == ended["by_tag"]
    with pytest.raises(UserError, match=r"rank|alpha"):
        Trainer(quick(tmp_path / "other", "lora.rank=4", f"lora.init={finished}"))
    assert not (tmp_path / "other").exists()


# rewards of every kind ---------------------------------------------------------------------------------

REWARD = """
import torch
from flowtilt import RewardOutput

class Mine:
    off_device = {remote}

    def __init__(self, *, device, gap=0, offset=0.0):
        assert device.type == "cpu"
        self.gap, self.offset = gap, offset

    def applies(self, prompt):
        return ""

    def __call__(self, images, prompts):
        scores = images.mean((1, 2, 3)) + self.offset
        if self.gap:
            scores[:: self.gap] = float("nan")
        return RewardOutput(scores, details={{"red": images[:, 0].mean((1, 2))}})
"""


def mine(folder, *overrides, remote=False):
    (folder / f"mine_{remote}.py").write_text(REWARD.format(remote=remote))
    base = ["rewards.playground=0", "rollouts=2", "evaluate.every=0", "evaluate.rewards=['mine/red','mine']", "guards=warn"]
    options = ", ".join(overrides)
    source = f"{folder}/mine_{remote}.py:Mine"
    return [*base, f'rewards.mine={{source="{source}", weight=1.0, options={{{options}}}}}']


def test_missing_scores_are_left_out_counted_and_warned_about(tmp_path):
    Trainer(quick(tmp_path / "run", *mine(tmp_path, "gap=5"))).run()
    records = read_lines(tmp_path / "run" / "metrics.jsonl")
    assert [record["missing/mine"] for record in records] == [3, 3]  # of 12
    assert all(record["reward/total"] == pytest.approx(record["reward/mine"]) for record in records)
    assert "missing" in [record["guard"] for record in read_lines(tmp_path / "run" / "guards.jsonl")]
    assert all(torch.isfinite(w).all() for w in weights(tmp_path / "run").values())
    evaluation = read_lines(tmp_path / "run" / "evaluations.jsonl")[0]
    assert evaluation["missing"] == {"mine": 2} and evaluation["score"] == evaluation["rewards"]["mine/red"]


def test_a_reward_is_built_with_its_options_and_an_unknown_one_is_refused_before_anything_is_written(tmp_path):
    Trainer(quick(tmp_path / "run", *mine(tmp_path, "offset=10.0"))).run()
    record = read_lines(tmp_path / "run" / "metrics.jsonl")[0]
    assert 10 < record["reward/mine"] < 11 and 0 < record["reward/mine/red"] < 1
    with pytest.raises(UserError, match=r"rewards\.mine: unknown option 'ofset'; did you mean 'offset'"):
        Trainer(quick(tmp_path / "other", *mine(tmp_path, "ofset=1.0")))
    assert not (tmp_path / "other").exists()


def test_scoring_elsewhere_while_sampling_changes_no_score(tmp_path):
    """Such a reward is asked part by part; images differ only by how their batches round."""
    for run, remote in (("here", False), ("there", True)):
        Trainer(quick(tmp_path / run, *MORE, *mine(tmp_path, remote=remote), whole=True)).run()
    here, there = (read_lines(tmp_path / run / "metrics.jsonl")[0] for run in ("here", "there"))
    assert there["reward/mine"] == pytest.approx(here["reward/mine"], abs=1e-6)
    for name, value in weights(tmp_path / "here").items():
        torch.testing.assert_close(weights(tmp_path / "there")[name], value, atol=1e-4, rtol=1e-3)


def test_the_playgrounds_verifier_may_watch_a_run_on_prompts_it_cannot_judge(tmp_path):
    (tmp_path / "prompts.txt").write_text("".join(f"castle number {k}\n" for k in range(6)))
    watched = [*mine(tmp_path), f"prompts={tmp_path}/prompts.txt", "evaluate.rewards=['mine']"]
    Trainer(quick(tmp_path / "run", *watched)).run()
    record = read_lines(tmp_path / "run" / "metrics.jsonl")[0]
    assert record["reward/playground"] is None and record["missing/playground"] == 0 and record["reward/mine"] > 0


def test_a_score_that_the_evaluation_does_not_give_is_an_error(tmp_path):
    with pytest.raises(UserError, match="no score 'mine/blue'; there are mine, mine/red"):
        Trainer(quick(tmp_path / "run", *mine(tmp_path), "evaluate.rewards=['mine/blue']")).run()
