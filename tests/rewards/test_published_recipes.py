"""The published recipes by their names, on a small SD3.5 and small reward models: every path that a real run takes.

The pipeline is saved to disk with the true classes, its base in bfloat16; text encoders and rewards are kept off the
device, activations are recomputed. Geometry, images and captions are small, everything else is the recipe's.
"""

import json
import math

import narrow_clip
import pytest
import test_mask2former
from conftest import QUICK
from diffusers import StableDiffusion3Pipeline
from tiny_pipelines import sd35

from flowtilt import Trainer, load_recipe
from flowtilt.check import check
from flowtilt.evaluate.assess import assess
from flowtilt.io.files import read_lines
from flowtilt.prompts.geneval import generate, to_lines
from flowtilt.rewards import clip, openclip
from flowtilt.rewards.geneval import detect, mask2former
from flowtilt.schedulers import CPSScheduler

SMALL = ["model.resolution=16", "model.t5_length=8", "model.dtype=bfloat16", "model.offload=true", "model.recompute=true"]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return sd35(tmp_path_factory.mktemp("sd35"))


@pytest.fixture(autouse=True)
def _small_weights(tmp_path, monkeypatch):
    narrow_clip.write_all(tmp_path)
    test_mask2former.use_tiny(monkeypatch, tmp_path)
    monkeypatch.setattr(openclip, "config", lambda name: narrow_clip.config())
    monkeypatch.setattr(detect, "LONGEST", 64)
    monkeypatch.setattr(detect, "SHORTEST", 64)
    monkeypatch.setenv("FLOWTILT_CAPTIONS", str(tmp_path / "captions"))
    for cache in (clip.load, mask2former.network):
        cache.cache_clear()
    yield
    for cache in (clip.load, mask2former.network):
        cache.cache_clear()


@pytest.fixture
def prompts(tmp_path, request):
    """What the recipe's set stands for: GenEval's scenes, or captions."""
    if "geneval" in load_recipe(request.getfixturevalue("name")).rewards:
        (tmp_path / "scenes.jsonl").write_text(to_lines(generate(40, seed=0)))
        return tmp_path / "scenes.jsonl"
    (tmp_path / "captions.txt").write_text(
        "\n".join(f"a picture of {n} {thing}" for thing in ("cats", "dogs", "owls") for n in range(2, 9))
    )
    return tmp_path / "captions.txt"


@pytest.mark.parametrize("name", ["sd35m-geneval", "sd35m-multireward", "sd35m-grpo-pickscore", "sd35m-ram"])
def test_a_published_recipe_trains_resumes_and_evaluates(name, model, prompts, tmp_path, monkeypatch):
    recipe = load_recipe(name)
    words = [word for word in QUICK if not (recipe.objective.type == "grpo" and word.startswith("objective."))]
    small = [*words, f"model.path={model}", *SMALL, f"run={tmp_path / 'run'}", "micro_batch=7"]
    small += [f"prompts={prompts}", f"evaluate.prompts={prompts}", "rollouts=2"]
    small += ["rollout.prompts=2", "evaluate.images=4", "evaluate.samples=2"]
    Trainer(load_recipe(name, small)).run()
    records = read_lines(tmp_path / "run" / "metrics.jsonl")
    assert len(records) == 2 and all(math.isfinite(record["loss"]) and record["skipped_updates"] == 0 for record in records)
    assert {f"reward/{reward}" for reward in recipe.rewards} <= set(records[0])

    # its text encoders have nothing left to do: what they said is on disk
    resumed = Trainer(load_recipe(name, [*small, "rollouts=3"]), resume=tmp_path / "run")
    with monkeypatch.context() as patched:
        patched.setattr(resumed.policy.model.pipeline, "encode_prompt", lambda *_, **__: pytest.fail("encoded again"))
        resumed.policy.model.encode([prompt.text for prompt in resumed.test_prompts[:1]])
    if name == "sd35m-geneval":
        found = assess(tmp_path / "evaluation", loras=[tmp_path / "run"], images=2, steps=2)
        assert {"geneval", "geneval/strict"} <= set(read_lines(tmp_path / "evaluation" / "scores.jsonl")[0]["scores"]) and found
    drawn = StableDiffusion3Pipeline.from_pretrained(model)
    drawn.load_lora_weights(tmp_path / "run" / "lora")
    assert drawn.get_list_adapters() == {"transformer": ["default_0"]}


@pytest.mark.parametrize("name", ["sd35m-geneval", "sd35m-multireward"])
def test_check_finds_a_published_recipe_ready_with_the_true_reward_classes(name, model, prompts, tmp_path):
    lines = []
    small = [f"model.path={model}", *SMALL, f"run={tmp_path / 'run'}", f"prompts={prompts}", f"evaluate.prompts={prompts}"]
    failed = check(
        load_recipe(name, [*small, "evaluate.steps=2", "rollout.prompts=4", "rollout.steps=3", "objective.times_per_image=2"]), lines.append
    )
    assert not failed, lines
    assert not (tmp_path / "run").exists() and any("stock diffusers draws the same image" in line for line in lines)


def test_rtdmds_two_published_stages_train_evaluate_and_stack(model, tmp_path):
    scenes = tmp_path / "scenes.jsonl"
    scenes.write_text(to_lines(generate(40, seed=0)))
    common = [
        f"model.path={model}",
        *SMALL,
        f"prompts={scenes}",
        f"evaluate.prompts={scenes}",
        "evaluate.images=2",
        "evaluate.every=0",
        "rollouts=2",
        "micro_batch=3",
    ]
    cold, rl = tmp_path / "cold", tmp_path / "rl"
    Trainer(load_recipe("sd35m-rtdmd-cold", [*common, "rollout.prompts=2", "objective.fake_updates=2", f"run={cold}"])).run()
    second = [*common, "rollout.prompts=2", "rollout.images_per_prompt=2", f'lora.on=["{cold}"]', f"run={rl}"]
    Trainer(load_recipe("sd35m-rtdmd-rl", second)).run()
    for run, names in ((cold, ("fake_loss", "teacher_gap")), (rl, ("fake_loss", "loss", "backprop_reward", "reward/geneval"))):
        records = read_lines(run / "metrics.jsonl")
        assert len(records) == 2 and all(math.isfinite(record[name]) for record in records for name in (*names, "grad_norm"))
        assert all(record["skipped_updates"] == 0 for record in records)
    resumed = Trainer(load_recipe("sd35m-rtdmd-rl", [*second, "rollouts=3"]), resume=rl)
    assert resumed.method.updates["fake"].count == resumed.method.updates["current"].count == 2

    found = assess(tmp_path / "evaluation", loras=[rl], images=2)
    protocol = json.loads((tmp_path / "evaluation" / "results.json").read_text())["protocol"]
    assert found and (protocol["solver"], protocol["steps"], protocol["eta"], len(protocol["lora"])) == ("cps", 4, 0.9, 2)
    drawn = StableDiffusion3Pipeline.from_pretrained(model)
    drawn.load_lora_weights(cold / "lora", adapter_name="student")
    drawn.load_lora_weights(rl / "lora", adapter_name="reinforced")
    drawn.scheduler = CPSScheduler.from_config(drawn.scheduler.config)
    drawn.set_adapters(["student", "reinforced"], [1, 1])
    call = {"num_inference_steps": 4, "guidance_scale": 1.0, "height": 16, "width": 16, "output_type": "np"}
    assert drawn("a cat", **call).images.shape == (1, 16, 16, 3)
