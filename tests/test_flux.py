"""The FLUX.1 adapter on small pipelines saved to disk as -dev and -schnell are: what it draws is what the stock pipeline draws."""

from types import SimpleNamespace

import pytest
import torch
from conftest import QUICK
from diffusers import DiffusionPipeline, FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel
from diffusers.pipelines.flux.pipeline_flux import calculate_shift
from meta_shapes import Shapes
from peft import PeftModel
from tiny_pipelines import flux

from flowtilt import Trainer, UserError, load_recipe
from flowtilt.cli import main
from flowtilt.config import ModelSettings
from flowtilt.io.files import read_lines
from flowtilt.lora.read import read_lora
from flowtilt.models.conditioning import Conditioning
from flowtilt.models.flux import Flux
from flowtilt.models.levels import levels_of, mu_by_tokens
from flowtilt.models.opening import load_pipeline, open_model
from flowtilt.policy.lora import LoraPolicy
from flowtilt.policy.roles import ROLES
from flowtilt.policy.tuned_model import TunedModel
from flowtilt.runs.export import export
from flowtilt.sampling.sampler import Sampler, decode

TEXTS = ["a red cat", "two dogs", "a red cat"]
CPU = torch.device("cpu")
SIZE, STEPS = 24, 5


@pytest.fixture(scope="module")
def dev(tmp_path_factory):
    return flux(tmp_path_factory.mktemp("dev"))


@pytest.fixture(scope="module")
def schnell(tmp_path_factory):
    return flux(tmp_path_factory.mktemp("schnell"), schnell=True)


def load(folder, dtype="float32", **options):
    pipeline = load_pipeline(str(folder), revision=None, dtype=dtype, device=CPU)
    return Flux(pipeline, **{"t5_length": 20, "resolution": SIZE, **options})


def noise(model, seed=0):
    return torch.randn(len(TEXTS), *model.latent_shape, generator=torch.Generator().manual_seed(seed))


def ours(model, guidance=1.0, loras=(), role="base"):
    stack = TunedModel(model, loras)
    return decode(stack, Sampler("euler", STEPS, guidance)(stack, role, noise(model), model.encode(TEXTS), 2), 3)


def stock(pipeline, model, guidance=1.0, **options):
    """The stock pipeline's images from the same noise, which it takes in patches."""
    pipeline.set_progress_bar_config(disable=True)
    packed = pipeline._pack_latents(noise(model), len(TEXTS), *model.latent_shape)
    said = {**model.call_options(guidance), **options}
    return pipeline(TEXTS, num_inference_steps=STEPS, latents=packed, output_type="pt", **said).images


def trained(folder, dtype="float32"):
    """A policy whose roles differ from the base and from one another."""
    policy = LoraPolicy(load(folder, dtype), rank=4, alpha=16.0, seed=0)
    rng = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for role in ROLES:
            for name, weight in policy._weights[role].items():
                if "lora_B" in name:
                    weight.normal_(0, 0.1, generator=rng)
            policy._version[role] = policy._tick()
    return policy


# what it draws ---------------------------------------------------------------------------------------


def test_dev_draws_the_stock_pipelines_images_with_its_guidance_at_its_shift(dev):
    model = load(dev)
    expected = stock(FluxPipeline.from_pretrained(dev), model)
    assert model.call_options(1.0)["guidance_scale"] == 3.5
    torch.testing.assert_close(ours(model), expected, atol=1e-5, rtol=0)
    for other in (stock(model.pipeline, model, guidance_scale=2.0), ours(load(dev, t5_length=40))):
        assert (other - expected).abs().max() > 1e-3
    weaker = load(dev, embedded_guidance=2.0)
    torch.testing.assert_close(ours(weaker), stock(model.pipeline, weaker), atol=1e-5, rtol=0)


def test_schnell_draws_the_stock_pipelines_images_without_any_guidance(schnell):
    model = load(schnell)
    assert model.protocol["shift"] == 1.0 and model.protocol["embedded_guidance"] is None
    torch.testing.assert_close(ours(model), stock(FluxPipeline.from_pretrained(schnell), model), atol=1e-5, rtol=0)


def test_classifier_free_guidance_is_the_pipelines_true_one(dev):
    model = load(dev)
    guided = ours(model, guidance=3.0)
    torch.testing.assert_close(guided, stock(model.pipeline, model, guidance=3.0), atol=1e-5, rtol=0)
    assert (guided - ours(model)).abs().max() > 1e-3


@pytest.mark.parametrize("size", [256, 512, 768, 1024, 2048])
def test_levels_are_the_schedulers_under_dynamic_shifting(size):
    scheduler = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, shift=3.0)  # FLUX.1-dev's
    tokens = (size // 16) ** 2
    for steps in (1, 4, 28):
        scheduler.set_timesteps(sigmas=torch.linspace(1, 1 / steps, steps).tolist(), mu=calculate_shift(tokens))
        assert (levels_of(scheduler.config, lambda n: mu_by_tokens(scheduler.config, tokens))(steps) - scheduler.sigmas).abs().max() < 1e-6
    if size == 1024:
        assert mu_by_tokens(scheduler.config, tokens) == pytest.approx(1.15)


def test_time_goes_in_unrounded(dev, monkeypatch):
    model, seen = load(dev), []
    forward = model.network.forward

    def spy(*args, **inputs):
        seen.append(inputs["timestep"])
        return forward(*args, **inputs)

    monkeypatch.setattr(model.network, "forward", spy)
    t = torch.tensor([0.0089285, 0.5, 1.0])
    with torch.no_grad():
        model.velocity(noise(model), t, model.encode(TEXTS))
    assert torch.equal(seen[0], t)


def test_a_half_precision_base_still_takes_and_gives_fp32(dev):
    half, full = load(dev, "bfloat16"), load(dev)
    with torch.no_grad():
        low, exact = (m.velocity(noise(m), torch.tensor(0.7), m.encode(TEXTS)) for m in (half, full))
        images = half.decode(noise(half))
    assert low.dtype == images.dtype == torch.float32
    assert (low - exact).abs().max() < 0.1 * exact.abs().max()


# training --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_recomputing_activations_changes_no_bit_in_either_kind_of_block(dev, dtype):
    policy, t, found = trained(dev, dtype), torch.tensor([0.1, 0.5, 0.99]), []
    given = policy.model.encode(TEXTS)
    for on in (False, True):
        policy.recompute(on)
        for p in policy.parameters:
            p.grad = None
        saved = []
        with torch.autograd.graph.saved_tensors_hooks(lambda x, saved=saved: saved.append(x.nbytes) or x, lambda x: x):
            v = policy.velocity("current", noise(policy.model), t, given)
        with torch.no_grad():
            policy.velocity("old", noise(policy.model), t, given)
            policy.velocity("reference", noise(policy.model), t, given)
        v.square().mean().backward()
        found.append(([p.grad.clone() for p in policy.parameters], sum(saved)))
    (exact, whole), (again, less) = found
    assert all(torch.equal(a, b) for a, b in zip(exact, again, strict=True)) and less < whole / 2
    assert all(grad.any() for grad in exact)  # every layer of both kinds of blocks reaches the image


def test_a_half_precision_base_computes_the_bits_of_diffusers_with_the_same_lora(dev, tmp_path):
    policy = trained(dev, "bfloat16")
    policy.save_lora(str(tmp_path), "ema")
    plain = load(dev, "bfloat16")
    plain.pipeline.load_lora_weights(tmp_path)
    given, t = plain.encode(TEXTS), torch.tensor(0.4)
    with torch.no_grad():
        expected = plain.velocity(noise(plain), t, given)
        assert torch.equal(policy.velocity("ema", noise(plain), t, given), expected)
        stack = TunedModel(load(dev, "bfloat16"), [read_lora(tmp_path)])
        assert torch.equal(stack.velocity("tuned", noise(plain), t, given), expected)
        assert not torch.equal(stack.velocity("base", noise(plain), t, given), expected)


def test_at_full_size_loras_go_on_the_layers_of_flowgrpos_flux_and_shapes_are_right():
    """19 double blocks with 8 projections and 4 feed-forward layers, 38 single blocks with 3 projections: FLUX.1-dev on the meta device."""
    with torch.device("meta"):
        network = FluxTransformer2DModel(guidance_embeds=True).to(torch.bfloat16).requires_grad_(False)
        known = {"scheduler": FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True), "vae_scale_factor": 8, "default_sample_size": 128}
        reads = {"text_encoder": network, "text_encoder_2": network, "tokenizer_2": SimpleNamespace(model_max_length=512), "components": {}}
        model = Flux(SimpleNamespace(transformer=network, **known, **reads), resolution=512)
        policy = LoraPolicy(model, rank=64, alpha=128.0, seed=0)
        captions = {"encoder_hidden_states": torch.empty(1, 512, 4096), "pooled_projections": torch.empty(1, 768)}
        x, t = torch.empty(2, *model.latent_shape), torch.empty(2)
    assert 11.9e9 < sum(x.numel() for name, x in network.named_parameters() if "lora" not in name) < 11.91e9
    assert len(policy._layers) == 19 * 12 + 38 * 3
    assert sum(name.startswith("single_transformer_blocks") for name in policy._layers) == 38 * 3
    with Shapes():
        v = policy.velocity("current", x, t, Conditioning(captions, torch.zeros(2, dtype=torch.long)))
    assert v.shape == x.shape == (2, 16, 64, 64) and v.dtype == torch.float32 and v.requires_grad


def test_blocks_of_both_kinds_are_what_is_compiled_and_sharded(dev):
    model = load(dev)
    inside = {id(x) for block in model.blocks for x in block.parameters()}
    outside = {name.split(".")[0] for name, x in model.network.named_parameters() if id(x) not in inside}
    assert outside == {"x_embedder", "context_embedder", "time_text_embed", "norm_out", "proj_out"}


# whole runs ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def run(dev, tmp_path_factory):
    """Two rollouts through the whole loop."""
    place = tmp_path_factory.mktemp("run")
    (place / "prompts.txt").write_text("\n".join(f"a picture of {thing}" for thing in ("cat", "dog", "fox", "owl", "bee", "ant")))
    (place / "reward.py").write_text("def reward(images, prompts):\n    return images.mean((1, 2, 3))\n")
    (place / "flux.toml").write_text('base = "flux-dev"\n[rewards]\nmine = "reward.py:reward"\n')
    overrides = [f"model={dev}", f"model.resolution={SIZE}", "model.dtype=float32", "model.t5_length=20", "lora.rank=4"]
    overrides += ["model.options.embedded_guidance=2", f"prompts={place}/prompts.txt", f"evaluate.prompts={place}/prompts.txt"]
    overrides += [
        f"rewards.mine={place}/reward.py:reward",
        'evaluate.rewards=["mine"]',
        f"run={place}/run",
        "rollouts=2",
        "optimizer.lr=0.1",
        "ema=0",
    ]
    Trainer(load_recipe(place / "flux.toml", [*QUICK, *overrides])).run()
    return place / "run"


def test_a_run_trains_and_stock_diffusers_draws_its_lora(dev, run):
    records = read_lines(run / "metrics.jsonl")
    assert len(records) == 2 and records[1]["deviation"] > 0
    model, lora = load(dev), read_lora(run)
    pipeline = FluxPipeline.from_pretrained(dev)
    pipeline.load_lora_weights(run / "lora")
    tuned = ours(model, loras=[lora], role="tuned")
    torch.testing.assert_close(tuned, stock(pipeline, model), atol=1e-5, rtol=0)
    assert (tuned - ours(load(dev))).abs().max() > 1e-2


def test_the_runs_card_draws_with_the_runs_guidance(run):
    card = (run / "lora" / "README.md").read_text()
    assert f"sigmas=sigmas, height={SIZE}, width={SIZE}, max_sequence_length=20, guidance_scale=2.0).images" in card
    code = card.split("```python\n")[1].split("```")[0].replace("bfloat16", "float32").replace("cuda", "cpu")
    scope = {}
    exec(code, scope)
    assert scope["image"].size == (SIZE, SIZE) and scope["pipe"].transformer.peft_config


@pytest.mark.parametrize("to", ["diffusers", "peft", "generator_ema", "pipeline"])
def test_every_export_draws_what_the_run_draws(dev, run, tmp_path, to):
    export([run], tmp_path / "out", to)
    model = load(dev)
    tuned = ours(model, loras=[read_lora(run)], role="tuned")
    if to == "pipeline":
        pipeline = DiffusionPipeline.from_pretrained(tmp_path / "out")
        assert type(pipeline) is FluxPipeline
    else:
        again = ours(model, loras=[read_lora(tmp_path / "out")], role="tuned")
        assert torch.equal(again, tuned)
        pipeline = FluxPipeline.from_pretrained(dev)
        if to == "peft":
            PeftModel.from_pretrained(pipeline.transformer, str(tmp_path / "out"))  # puts its layers into the network
        elif to == "diffusers":
            pipeline.load_lora_weights(tmp_path / "out")
        else:
            return
    torch.testing.assert_close(stock(pipeline, model), tuned, atol=1e-5, rtol=0)


def test_sample_and_evaluate_take_the_pipeline_and_the_run(dev, run, tmp_path, capsys):
    words = ["--model", str(dev), "--lora", str(run), "--steps", "2"]
    assert main(["sample", "a cat", *words, "-o", str(tmp_path / "out.png")]) == 0
    assert main(["evaluate", *words, "--images", "6", "--compare", "base", "-o", str(tmp_path / "e")]) == 0
    page = (tmp_path / "e" / "report.html").read_text()
    assert "embedded guidance 2" in page and f"{SIZE} px" in page


# mistakes --------------------------------------------------------------------------------------------


def test_settings_that_the_pipeline_cannot_have_are_one_line(dev, schnell):
    for folder, options, said in (
        (dev, {"resolution": 18}, "multiple of 4"),
        (dev, {"t5_length": 0}, "can't be left out"),
        (schnell, {"embedded_guidance": 3.5}, "reads none"),
    ):
        with pytest.raises(UserError, match=said):
            load(folder, **options)
    with pytest.raises(UserError, match=r"model: Flux can't be built .*'guidence'"):
        open_model(ModelSettings(path=str(dev), resolution=SIZE, options={"guidence": 3.5}), CPU)
    published = load(dev, t5_length=None), load(schnell, t5_length=None)
    assert [model.t5_length for model in published] == [512, 256] and load(dev, resolution=None).latent_shape == (16, 128, 128)
