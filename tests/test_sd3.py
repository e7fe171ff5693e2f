"""The Stable Diffusion 3 adapter on a small pipeline with all three text encoders, saved to disk as SD3.5-Medium is."""

import pytest
import torch
from conftest import QUICK
from diffusers import StableDiffusion3Pipeline
from tiny_pipelines import sd35

from flowtilt import Trainer, UserError, load_recipe
from flowtilt.io.files import read_lines
from flowtilt.models.opening import load_pipeline
from flowtilt.models.sd3 import SD3


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return sd35(tmp_path_factory.mktemp("sd3"))


def load(folder, dtype="float32", **options):
    return SD3(load_pipeline(str(folder), revision=None, dtype=dtype, device=torch.device("cpu")), **{"t5_length": 20, **options})


def test_the_whole_loop_runs_on_another_pipeline(folder, tmp_path):
    (tmp_path / "prompts.txt").write_text("\n".join(f"a picture of {thing}" for thing in ("cat", "dog", "fox", "owl", "bee", "ant")))
    (tmp_path / "reward.py").write_text("def reward(images, prompts):\n    return images.mean((1, 2, 3))\n")
    overrides = [f"model={folder}", "model.resolution=16", "model.dtype=float32", f"prompts={tmp_path}/prompts.txt"]
    overrides += [f"rewards.mine={tmp_path}/reward.py:reward", f"run={tmp_path}/run", "lora.rank=4", "rollouts=2"]
    Trainer(load_recipe("sd35m", [*QUICK, *overrides])).run()
    records = read_lines(tmp_path / "run" / "metrics.jsonl")
    assert len(records) == 2 and records[1]["deviation"] > 0
    pipeline = StableDiffusion3Pipeline.from_pretrained(folder)
    pipeline.load_lora_weights(tmp_path / "run" / "lora")
    assert "stable-diffusion" not in (tmp_path / "run" / "lora" / "README.md").read_text()
    assert len(pipeline.get_list_adapters()["transformer"]) == 1


def test_each_distinct_caption_is_encoded_once_at_the_t5_length_that_was_asked_for(folder, monkeypatch):
    model, seen = load(folder), []
    encode = model.pipeline.encode_prompt

    def counted(prompts, *args, **options):
        seen.append((list(prompts), options["max_sequence_length"]))
        return encode(prompts, *args, **options)

    monkeypatch.setattr(model.pipeline, "encode_prompt", counted)
    given = model.encode(["a cat", "a dog", "a cat", "a cat"])
    again = model.encode(["a dog"]).tensors()["encoder_hidden_states"]
    assert seen == [(["a cat"], 20), (["a dog"], 20)]
    assert given.distinct["encoder_hidden_states"].shape == (2, 10 + 20, 160)
    embeds = given.tensors()["encoder_hidden_states"]
    assert torch.equal(embeds[0], embeds[2]) and torch.equal(embeds[1], again[0]) and not torch.equal(embeds[0], embeds[1])
    assert load(folder, t5_length=40).encode(["a cat"]).distinct["encoder_hidden_states"].shape[1] == 50


def test_a_pipeline_whose_t5_was_left_out_opens_and_draws(folder, tmp_path):
    whole = StableDiffusion3Pipeline.from_pretrained(folder)
    whole.register_modules(text_encoder_3=None, tokenizer_3=None)
    whole.save_pretrained(tmp_path)
    model = SD3(load_pipeline(str(tmp_path), revision=None, dtype="float32", device=torch.device("cpu")))
    assert model.t5_length == 0
    with torch.no_grad():
        assert model.velocity(torch.zeros(1, 16, 8, 8), torch.tensor(0.5), model.encode(["a cat"])).isfinite().all()


def test_the_timestep_is_exactly_1000_sigma(folder, monkeypatch):
    model, seen = load(folder), []
    forward = model.network.forward

    def spy(*args, **inputs):
        seen.append(inputs["timestep"])
        return forward(*args, **inputs)

    monkeypatch.setattr(model.network, "forward", spy)
    t = torch.tensor([0.0089285, 0.5])
    with torch.no_grad():
        model.velocity(torch.zeros(2, 16, 8, 8), t, model.encode(["a", "b"]))
    assert seen[0].dtype == torch.float32 and torch.equal(seen[0], 1000 * t)


def test_a_half_precision_base_still_takes_and_gives_fp32(folder):
    half, full = load(folder, "bfloat16"), load(folder)
    x, t = torch.randn(2, 16, 8, 8, generator=torch.Generator().manual_seed(0)), torch.tensor(0.7)
    with torch.no_grad():
        ours, exact = (m.velocity(x, t, m.encode(["a cat", "a dog"])) for m in (half, full))
        images = half.decode(x)
    assert ours.dtype == images.dtype == torch.float32
    assert (ours - exact).abs().max() < 0.1 * exact.abs().max()
    assert images.min() >= 0 and images.max() <= 1


def test_decoding_carries_a_gradient_where_asked(folder):
    x = torch.zeros(1, 16, 8, 8, requires_grad=True)
    load(folder).decode(x).mean().backward()
    assert x.grad is not None and x.grad.abs().sum() > 0


def test_the_shift_and_latents_come_from_the_pipeline(folder):
    model = load(folder)
    assert model.protocol["shift"] == 3.0 and model.latent_shape == (16, 8, 8)
    assert load(folder, resolution=32).latent_shape == (16, 16, 16)
    with pytest.raises(UserError, match="beyond the 32"):
        load(folder, resolution=64)
    with pytest.raises(UserError, match="multiple of 4"):
        load(folder, resolution=18)
    with pytest.raises(UserError, match="t5_length"):
        load(folder, t5_length=0)


def test_a_folder_that_is_no_pipeline_is_one_line(tmp_path):
    with pytest.raises(UserError, match=r"model_index\.json"):
        load(tmp_path)
    (tmp_path / "model_index.json").write_text('{"_class_name": "FluxPipeline"}')
    with pytest.raises(UserError, match="can't be loaded") as caught:
        load(tmp_path)
    assert "\n" not in str(caught.value)
