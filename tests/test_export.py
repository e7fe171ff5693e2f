"""LoRAs out: plain diffusers and plain PEFT load every export and draw what our own stack draws."""

import argparse
import json
from pathlib import Path

import pytest
import torch
from conftest import quick
from diffusers import DiffusionPipeline, SD3Transformer2DModel, StableDiffusion3Pipeline
from peft import LoraConfig, PeftModel, inject_adapter_in_model
from reading import from_pretrained
from safetensors.torch import load_file
from test_lora import random_lora, same

from flowtilt import Trainer, UserError
from flowtilt.cli import export as command
from flowtilt.io import hub
from flowtilt.lora.fit import linear_layers, shapes_of
from flowtilt.lora.read import read_lora
from flowtilt.lora.write import to_diffusers, to_peft
from flowtilt.models.opening import load_pipeline
from flowtilt.models.sd3 import SD3
from flowtilt.playground import pipeline_path
from flowtilt.policy.tuned_model import TunedModel
from flowtilt.runs.export import FORMATS, export
from flowtilt.sampling.sampler import Sampler, decode
from flowtilt.seeding import noise

TEXTS = ["a red circle left of a blue square", "three green triangles"]
STEPS = 4


@pytest.fixture(scope="module")
def random_base(tmp_path_factory):
    """A pipeline of random weights with SD3.5-Medium's dual attention; its network is stored in bfloat16 and in several files."""
    torch.manual_seed(0)
    network = SD3Transformer2DModel(
        sample_size=8,
        in_channels=8,
        out_channels=8,
        num_layers=3,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=128,
        caption_projection_dim=32,
        pooled_projection_dim=128,
        pos_embed_max_size=8,
        qk_norm="rms_norm",
        dual_attention_layers=(0, 1),
    )
    folder = tmp_path_factory.mktemp("base")
    StableDiffusion3Pipeline.from_pretrained(pipeline_path(), transformer=network).save_pretrained(folder)
    network.to(torch.bfloat16).save_pretrained(folder / "transformer", max_shard_size="100KB")
    (folder / "transformer" / "diffusion_pytorch_model.safetensors").unlink()
    (folder / "LICENSE.md").write_text("what the base's licence says")
    (folder / "another_checkpoint.safetensors").write_bytes(b"large")
    return folder


@pytest.fixture(scope="module")
def exact_base(tmp_path_factory):
    """The playground's pipeline, whose weights are stored in float16, with its network in float32: merging into it rounds nothing."""
    folder = tmp_path_factory.mktemp("exact")
    plain(pipeline_path()).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module", params=["trained", "random"])
def base(request, exact_base, random_base):
    return exact_base if request.param == "trained" else random_base


@pytest.fixture(scope="module")
def loras(base, tmp_path_factory):
    """Two LoRAs on that base, as places: a diffusers file with several ranks and alphas, and a PEFT folder."""
    place = tmp_path_factory.mktemp("loras")
    shapes = shapes_of(plain(base).transformer)
    to_diffusers(random_lora(shapes, mixed=True), place / "one")
    to_peft(random_lora(shapes, rank=2, alpha=3.0, seed=1, ends=("to_q", "ff.net.2")), place / "two")
    return [place / "one", place / "two"]


def plain(place):
    pipeline = from_pretrained(place, dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def by_diffusers(pipeline):
    start = noise(0, "test", [(0,), (1,)], (8, 8, 8))
    settings = {"guidance_scale": 1.0, "max_sequence_length": 1, "output_type": "pt"}
    return pipeline(TEXTS, latents=start, sigmas=[1 - k / STEPS for k in range(STEPS)], **settings).images


def by_us(place, loras):
    model = SD3(load_pipeline(str(place), revision=None, dtype="float32", device=torch.device("cpu")))
    stack, start = TunedModel(model, loras), noise(0, "test", [(0,), (1,)], (8, 8, 8))
    return decode(stack, Sampler("euler", STEPS, 1.0)(stack, "tuned", start, model.encode(TEXTS), 2), 2)


def close(ours, theirs, pipeline_without):
    assert (theirs - by_diffusers(pipeline_without)).abs().max() > 0.02  # the LoRA is seen at all
    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=0)


def load_as_diffusers(base, folder):
    pipeline = plain(base)
    pipeline.load_lora_weights(folder)
    return pipeline


def load_as_peft(base, folder):
    pipeline = plain(base)
    pipeline.transformer = PeftModel.from_pretrained(pipeline.transformer, str(folder))
    return pipeline


def load_as_rtdmd(base, folder):
    """As its own inference does: an adapter of the rank and alpha that the user states, then the flat state dict."""
    pipeline, weights = plain(base), torch.load(folder / "generator_ema.pt", weights_only=True)
    said = json.loads((folder / "adapter_config.json").read_text())
    targets = sorted({name.partition(".lora_")[0] for name in weights})
    inject_adapter_in_model(LoraConfig(r=said["r"], lora_alpha=said["lora_alpha"], target_modules=targets), pipeline.transformer)
    missing, unexpected = pipeline.transformer.load_state_dict(weights, strict=False)
    assert not unexpected and not [name for name in missing if ".lora_" in name]
    return pipeline


def load_as_comfyui(base, folder):
    """W + alpha / r B A of the layers that the original names mean; `test_lora_original` compares those with diffusers' conversions."""
    pipeline = plain(base)
    read = read_lora(folder)
    for layer, linear in linear_layers(pipeline.transformer).items():
        if layer in read.layers:
            a, b = read.layers[layer]
            linear.weight.data += read.scale(layer) * b @ a
    return pipeline


LOADERS = {
    "comfyui": load_as_comfyui,
    "diffusers": load_as_diffusers,
    "peft": load_as_peft,
    "generator_ema": load_as_rtdmd,
    "pipeline": lambda _, folder: plain(folder),
}


@pytest.mark.parametrize("to", ["diffusers", "peft", "pipeline"])
def test_two_loras_exported_as_one_draw_what_the_stack_draws(base, loras, tmp_path, to):
    export(loras, tmp_path / "out", to, model=str(base))
    theirs = by_diffusers(LOADERS[to](base, tmp_path / "out"))
    ours = by_us(base, [read_lora(place) for place in loras])
    if (base / "LICENSE.md").exists() and to == "pipeline":  # rounded to the base's bfloat16, as a merged pipeline is
        assert (theirs - ours).abs().mean() < 0.1 * (ours - by_diffusers(plain(base))).abs().mean()
    else:
        close(ours, theirs, plain(base))


@pytest.mark.parametrize("to", FORMATS)
def test_one_lora_keeps_its_scale_for_whoever_loads_it(exact_base, tmp_path, to):
    lora = random_lora(shapes_of(plain(exact_base).transformer), alpha=14.0, ends=("to_q", "to_add_out"))
    assert lora.scales() == [3.5]
    to_diffusers(lora, tmp_path / "lora")
    export([tmp_path / "lora"], tmp_path / "out", to, model=str(exact_base))
    theirs = by_diffusers(LOADERS[to](exact_base, tmp_path / "out"))
    close(by_us(exact_base, [lora]), theirs, plain(exact_base))
    if to != "pipeline":
        same(lora, read_lora(tmp_path / "out"))


def test_a_file_has_its_full_strength_for_whoever_reads_no_metadata(exact_base, learnt, tmp_path):
    """ComfyUI, a state dict given to diffusers, and its `load_lora_adapter` do not see the alpha of the header."""
    lora = random_lora(shapes_of(plain(exact_base).transformer), rank=32, alpha=64.0, size=0.02, ends=("to_q", "to_add_out"))
    to_diffusers(lora, tmp_path / "written")
    for folder in (tmp_path / "written", learnt / "lora"):
        file = folder / "pytorch_lora_weights.safetensors"
        with_header, by_dict, by_adapter = plain(exact_base), plain(exact_base), plain(exact_base)
        with_header.load_lora_weights(folder)
        by_dict.load_lora_weights(load_file(file))
        by_adapter.transformer.load_lora_adapter(load_file(file), prefix="transformer")
        images = by_diffusers(with_header)
        assert torch.equal(by_diffusers(by_dict), images) and torch.equal(by_diffusers(by_adapter), images)
    same(read_lora(tmp_path / "written"), lora)


def test_ranks_and_alphas_that_differ_are_kept_by_diffusers_and_peft(base, loras, tmp_path):
    ours = by_us(base, [read_lora(loras[0])])
    for to in ("diffusers", "peft"):
        export(loras[:1], tmp_path / to, to)
        close(ours, by_diffusers(LOADERS[to](base, tmp_path / to)), plain(base))
    with pytest.raises(UserError, match="one rank; choose --to peft"):
        export(loras[:1], tmp_path / "flat", "generator_ema")
    assert not (tmp_path / "flat").exists()


def test_a_merged_pipeline_is_the_base_but_for_the_merged_layers(random_base, tmp_path):
    lora = random_lora(shapes_of(plain(random_base).transformer), mixed=True)
    to_diffusers(lora, tmp_path / "lora")
    export([tmp_path / "lora"], tmp_path / "out", "pipeline", model=str(random_base))
    files = {file.relative_to(random_base) for file in random_base.rglob("*") if file.is_file()}
    written = {file.relative_to(tmp_path / "out") for file in (tmp_path / "out").rglob("*") if file.is_file()}
    assert written == files - {Path("another_checkpoint.safetensors")}
    shards = [file for file in written if file.parts[0] == "transformer" and file.suffix == ".safetensors"]
    assert len(shards) > 2
    assert all((tmp_path / "out" / file).read_bytes() == (random_base / file).read_bytes() for file in written - set(shards))
    for file in shards:
        before, after = load_file(random_base / file), load_file(tmp_path / "out" / file)
        for name, weight in before.items():
            layer = name.removesuffix(".weight")
            assert after[name].dtype == weight.dtype == torch.bfloat16
            if layer in lora.layers and name.endswith(".weight"):
                a, b = lora.layers[layer]
                exact = weight.double() + lora.scale(layer) * b.double() @ a.double()
                torch.testing.assert_close(after[name].double(), exact, atol=1e-6, rtol=2**-8)
            else:
                assert torch.equal(after[name], weight)
    pipeline = DiffusionPipeline.from_pretrained(tmp_path / "out", dtype=torch.bfloat16)
    assert torch.equal(pipeline.transformer.state_dict()[f"{layer}.weight"], after[f"{layer}.weight"])


def test_in_an_fp32_base_merged_loras_have_the_stacks_bits(exact_base, tmp_path):
    shapes = shapes_of(plain(exact_base).transformer)
    two = [random_lora(shapes, seed=k, mixed=bool(k)) for k in range(2)]
    for k, lora in enumerate(two):
        to_diffusers(lora, tmp_path / str(k))
    export([tmp_path / "0", tmp_path / "1"], tmp_path / "out", "pipeline", model=str(exact_base))
    read = [read_lora(tmp_path / str(k)) for k in range(2)]
    assert torch.equal(by_us(tmp_path / "out", []), by_us(exact_base, read))
    close(by_us(exact_base, two), by_us(exact_base, read), plain(exact_base))


@pytest.fixture(scope="module")
def few_steps(tmp_path_factory):
    """A short run that is evaluated with four stochastic steps."""
    folder = tmp_path_factory.mktemp("runs") / "cps"
    cps = ["evaluate.solver=cps", "evaluate.eta=0.8", "evaluate.guidance=2.0", "evaluate.every=0", f"evaluate.steps={STEPS}"]
    Trainer(quick(folder, "rollouts=1", "rollout.prompts=2", "optimizer.steps_per_rollout=1", *cps, whole=True)).run()
    return folder


@pytest.mark.parametrize("to", ["diffusers", "peft"])
def test_the_card_of_a_run_with_stochastic_steps_draws_as_its_evaluation(few_steps, tmp_path, to):
    export([few_steps], tmp_path / "out", to)
    text = (tmp_path / "out" / "README.md").read_text()
    assert f"{STEPS} cps steps of eta 0.8" in text and "sigmas" not in text
    scope = {}
    snippet = text.split("```python\n")[1].split("```")[0]
    exec(snippet, scope)
    assert scope["image"].size == (32, 32)
    # its call once more, with noise that is known
    scope |= {"start": noise(0, "test", [(0,), (1,)], (8, 8, 8)), "texts": TEXTS}
    options = snippet.splitlines()[-1].split(", ", 1)[1].removesuffix(").images[0]")
    scope["pipe"].scheduler.generator = [torch.Generator().manual_seed(k) for k in range(2)]
    theirs = eval(f'pipe(texts, latents=start, output_type="pt", {options}).images', scope)
    rngs = [torch.Generator().manual_seed(k) for k in range(2)]
    z = [torch.cat([torch.randn(1, 8, 8, 8, generator=rng) for rng in rngs]) for _ in range(STEPS - 1)]
    model = SD3(load_pipeline(str(pipeline_path()), revision=None, dtype="float32", device=torch.device("cpu")))
    stack, sampler = TunedModel(model, [read_lora(few_steps)]), Sampler("cps", STEPS, 2.0, 0.8)
    latents = sampler(stack, "tuned", scope["start"], model.encode(TEXTS), 2, lambda rows, j: z[j][rows])
    torch.testing.assert_close(decode(stack, latents, 2), theirs, atol=1e-4, rtol=0)


def test_a_run_knows_its_base(learnt, tmp_path):
    export([learnt], tmp_path / "out", "pipeline")
    merged, ours = by_us(tmp_path / "out", []), by_us(pipeline_path(), [read_lora(learnt)])
    assert (merged - ours).abs().max() < 0.1 * (ours - by_us(pipeline_path(), [])).abs().max()  # float16's rounding


def test_another_base_is_refused_where_the_base_is_at_hand(learnt, random_base, tmp_path):
    for to in ("diffusers", "pipeline"):
        with pytest.raises(UserError, match="belongs to another base"):
            export([learnt], tmp_path / "out", to, model=str(random_base))
    assert list(tmp_path.iterdir()) == []
    export([learnt], tmp_path / "lora", "diffusers")
    (tmp_path / "lora" / "recipe.toml").unlink()
    with pytest.raises(UserError, match="does not tell its base; name the pipeline to merge into with --model"):
        export([tmp_path / "lora"], tmp_path / "out", "pipeline")


def test_a_base_on_the_hub_is_fetched(learnt, tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(hub, "pipeline_folder", lambda path, revision: asked.append((path, revision)) or pipeline_path())
    export([learnt], tmp_path / "out", "pipeline", model="some/model")
    assert asked == [("some/model", None)] and (tmp_path / "out" / "model_index.json").exists()
    export([learnt], tmp_path / "peft", "peft", model="some/model")
    assert (
        len(asked) == 1 and json.loads((tmp_path / "peft" / "adapter_config.json").read_text())["base_model_name_or_path"] == "some/model"
    )

    def offline(path, revision):
        raise OSError("no network\nat all")

    monkeypatch.setattr(hub, "pipeline_folder", offline)
    with pytest.raises(UserError, match=r"some/model: neither a folder nor to be had from the hub: no network$"):
        export([learnt], tmp_path / "more", "pipeline", model="some/model")


@pytest.mark.parametrize("to", FORMATS)
def test_nothing_is_ever_written_over(learnt, tmp_path, to):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.tex").touch()
    (tmp_path / "file").touch()
    for taken in ("full", "file"):
        with pytest.raises(UserError, match="there already; choose a new folder with -o"):
            export([learnt], tmp_path / taken, to)
    (tmp_path / "empty").mkdir()
    export([learnt], tmp_path / "empty", to)
    assert any((tmp_path / "empty").iterdir())


def test_what_fails_half_way_leaves_nothing(learnt, tmp_path, monkeypatch):
    def full(*args, **options):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("flowtilt.lora.write.save_file", full)
    monkeypatch.setattr("flowtilt.lora.merge.save_file", full)
    for to in ("peft", "pipeline"):
        with pytest.raises(UserError, match="No space left on device"):
            export([learnt], tmp_path / "out", to)
    assert list(tmp_path.iterdir()) == []


def test_the_command(learnt, tmp_path, capsys):
    top = argparse.ArgumentParser()
    command.add(top.add_subparsers())
    assert tuple(command.FORMATS) == tuple(FORMATS)
    for to in FORMATS:
        words = top.parse_args(["export", str(learnt), f"{learnt}@32", "--to", to, "-o", str(tmp_path / to)])
        assert words.call(words) == 0
        out, err = capsys.readouterr()
        assert out.count("\n") == 1 and str(tmp_path / to) in out and not err
    twice = read_lora(tmp_path / "generator_ema")
    assert twice.ranks() == [64] and twice.scales() == [2.0]
    one = read_lora(learnt)
    for name, (a, b) in twice.layers.items():
        torch.testing.assert_close(b @ a, one.layers[name][1] @ one.layers[name][0], atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("to", ["diffusers", "peft", "comfyui", "generator_ema"])
def test_equal_weights_give_equal_files_with_the_permissions_of_others(random_base, tmp_path, to):
    lora = random_lora(shapes_of(plain(random_base).transformer), rank=2, alpha=3.0)
    to_diffusers(lora, tmp_path / "lora")
    written = []
    for name in ("one", "two", "three", "four"):
        export([tmp_path / "lora"], tmp_path / name, to, model=str(random_base))
        written.append({file.name: file.read_bytes() for file in (tmp_path / name).iterdir()})
        assert len({file.stat().st_mode for file in (tmp_path / name).iterdir()}) == 1
    assert all(files == written[0] for files in written)
    if to == "peft":  # a set's order would be another one in another process
        targets = json.loads(written[0]["adapter_config.json"])["target_modules"]
        assert targets == sorted(targets)


def test_a_runs_lora_is_the_same_file_whenever_it_is_written(finished, tmp_path):
    trainer = Trainer(quick(tmp_path / "run"))
    files = []
    for name in ("one", "two", "three", "four"):
        trainer.policy.save_lora(str(tmp_path / name))
        files.append((tmp_path / name / "pytorch_lora_weights.safetensors").read_bytes())
    assert len(set(files)) == 1
    trainer.close()
