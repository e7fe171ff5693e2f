"""The published recipes by their names, on a small SD3.5 and small reward models: every path that a real run takes.

The pipeline is saved to disk with the true classes, its base in bfloat16; text encoders and rewards are kept off the
device, activations are recomputed. Geometry and images are small, everything else is the recipe's.
"""

import math

import narrow_clip
import pytest
import test_mask2former
from conftest import QUICK
from diffusers import StableDiffusion3Pipeline
from tiny_pipelines import sd35

from flowtilt import Trainer, load_recipe
from flowtilt.evaluate.assess import assess
from flowtilt.files import read_lines
from flowtilt.prompts.geneval import generate, to_lines
from flowtilt.rewards import clip, openclip
from flowtilt.rewards.geneval import detect, mask2former


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
    small = [*words, f"model.path={model}", "model.resolution=16", "model.dtype=bfloat16", f"run={tmp_path / 'run'}", "micro_batch=7"]
    small += ["model.offload=true", "model.recompute=true", f"prompts={prompts}", f"evaluate.prompts={prompts}", "steps=2"]
    Trainer(load_recipe(name, small)).run()
    records = read_lines(tmp_path / "run" / "metrics.jsonl")
    assert len(records) == 2 and all(math.isfinite(record["loss"]) and record["skipped_updates"] == 0 for record in records)
    assert {f"reward/{reward}" for reward in recipe.rewards} <= set(records[0])

    # its text encoders have nothing left to do: what they said is on disk
    resumed = Trainer(load_recipe(name, [*small, "steps=3"]), resume=tmp_path / "run")
    with monkeypatch.context() as patched:
        patched.setattr(resumed.policy.model.pipeline, "encode_prompt", lambda *_, **__: pytest.fail("encoded again"))
        resumed.policy.model.encode([prompt.text for prompt in resumed.test_prompts[:1]])
    if name == "sd35m-geneval":
        found = assess(tmp_path / "evaluation", loras=[tmp_path / "run"], images=2, steps=2)
        assert {"geneval", "geneval/strict"} <= set(read_lines(tmp_path / "evaluation" / "scores.jsonl")[0]["scores"]) and found
    drawn = StableDiffusion3Pipeline.from_pretrained(model)
    drawn.load_lora_weights(tmp_path / "run" / "lora")
    assert drawn.get_list_adapters() == {"transformer": ["default_0"]}
