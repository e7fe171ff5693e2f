"""`flowtilt plan`: what it computes is what a run does, on the playground to the unit; published sizes elsewhere."""

import argparse
import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from conftest import quick
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from flowtilt import Trainer, UserError, load_recipe
from flowtilt.cli import Parser, plan
from flowtilt.config import recipe_names
from flowtilt.distributed import World
from flowtilt.models.base import Conditioning
from flowtilt.models.opening import load_pipeline
from flowtilt.models.sd3 import SD3
from flowtilt.plan import GPUS, Machine, make_plan
from flowtilt.plan.geometry import KNOWN, find_geometry
from flowtilt.plan.judges import judging
from flowtilt.plan.memory import CONTEXT, GIB, sizes
from flowtilt.plan.meter import measure
from flowtilt.plan.network import batch, build_pipeline, conditioning, costs_of, train_work, weights_of
from flowtilt.plan.passes import evaluations_in_all, passes_of
from flowtilt.plan.text import summary, table
from flowtilt.playground import pipeline_path
from flowtilt.policy import Policy
from flowtilt.rewards.named import parse
from flowtilt.rollout import TrainingBatch
from flowtilt.setup import build_policy

CPU = torch.device("cpu")
MEDIUM = "stabilityai/stable-diffusion-3.5-medium"


def costs(recipe):
    return costs_of(recipe.model, recipe.lora.rank, recipe.lora.alpha, recipe.objective)


def typed(capsys, *words):
    """What a person reads who types `flowtilt plan …`."""
    top = Parser()
    plan.add(top.add_subparsers(dest="command", required=True))
    args: argparse.Namespace = top.parse_args(["plan", *words])
    assert args.call(args) == 0
    return capsys.readouterr().out


# the meter ----------------------------------------------------------------------------------------


def test_a_linear_layer_costs_two_operations_a_weight_and_row_and_twice_that_backward():
    layer = nn.Linear(7, 5, device="meta")
    rows = torch.empty(3, 7, device="meta")
    with torch.no_grad():
        assert measure(lambda: layer(rows)).flops == {"single": 2 * 3 * 7 * 5}
    assert measure(lambda: layer(rows).sum()).flops == {"single": 2 * (2 * 3 * 7 * 5)}  # no gradient to the rows themselves
    half = nn.Linear(7, 5, device="meta", dtype=torch.bfloat16)
    with torch.no_grad():
        assert measure(lambda: half(rows.bfloat16())).flops == {"half": 2 * 3 * 7 * 5}


def test_bytes_that_live_at_once_follow_a_chain_of_layers():
    layers = nn.Sequential(nn.Linear(10, 100), nn.Linear(100, 20), nn.Linear(20, 1)).to("meta")
    with torch.no_grad():
        work = measure(lambda: layers(torch.empty(4, 10, device="meta")))
    # four rows of four-byte numbers; a layer's input goes once its output is there, the first is its caller's
    assert [count / 16 for count in work.alive] == [10, 10 + 100, 10 + 100 + 20, 10 + 20 + 1] and work.peak == 16 * 130


def test_what_is_saved_for_the_backward_pass_is_counted_once_and_without_weights_and_inputs():
    x, layer = torch.rand(4, 6), nn.Linear(6, 6)

    def loss():
        y = layer(x).sigmoid()  # sigmoid saves its output, so do both sides of the product: one storage
        return (y * y).sum()

    assert measure(loss).saved == 4 * 4 * 6


def test_a_network_without_attention_costs_what_torch_counts():
    vae = build_pipeline(find_geometry("playground"), "float32").vae
    latents = torch.empty(2, 8, 8, 8, device="meta")
    with torch.no_grad():
        with FlopCounterMode(display=False) as counter:
            vae.decode(latents)
        assert sum(measure(lambda: vae.decode(latents)).flops.values()) == counter.get_total_flops()


# the model ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_weights_are_those_of_the_loaded_pipeline(dtype):
    loaded = load_pipeline("playground", revision=None, dtype=dtype, device=CPU)
    computed = build_pipeline(find_geometry("playground"), dtype)
    for name in ("transformer", "vae", "text_encoder", "text_encoder_2", "text_encoder_3"):
        module = getattr(loaded, name)
        tensors = [*module.parameters(), *(b for key, b in module.named_buffers() if key in module.state_dict())]
        found = weights_of(getattr(computed, name))
        assert found.number == sum(x.numel() for x in tensors), name
        assert found.bytes == sum(x.nbytes for x in tensors), name


def test_published_pipelines_have_the_sizes_of_their_published_files():
    def gigabytes(module):
        return 2 * weights_of(module).number / 1e9  # all are published in 16 bits

    # huggingface.co lists stable-diffusion-3.5-medium's files so; the T5's two are 4.99 and 4.53 GB
    medium = build_pipeline(KNOWN[MEDIUM], "bfloat16")
    published = {"transformer": 4.94, "text_encoder": 0.247, "text_encoder_2": 1.39, "text_encoder_3": 4.99 + 4.53, "vae": 0.168}
    assert {name: pytest.approx(gigabytes(getattr(medium, name)), rel=3e-3) for name in published} == published
    # total_size in stable-diffusion-3.5-large's index of its transformer's files, to the byte; stable-diffusion-3-medium's one file
    large = build_pipeline(KNOWN["stabilityai/stable-diffusion-3.5-large"], "bfloat16")
    assert 2 * weights_of(large.transformer).number == 16_292_561_536
    small = build_pipeline(KNOWN["stabilityai/stable-diffusion-3-medium-diffusers"], "bfloat16")
    assert gigabytes(small.transformer) == pytest.approx(4.17, rel=2e-3)


def test_reward_models_have_their_published_sizes_and_costs():
    models = judging(parse(["pickscore", "aesthetic", "clipscore", "imagereward", "geneval"]), 512).models
    assert set(models) == {"pickscore", "clip-l", "imagereward", "mask2former"}  # clip-l once for three rewards
    # the table of models in open_clip's docs/model_profile.csv: millions of parameters, GFLOP of an image and of a text
    for name, (size, image, text) in {"clip-l": (427.62, 162.03, 13.3), "pickscore": (986.11, 334.59, 47.09)}.items():
        model = models[name]
        assert model.weights.number / 1e6 == pytest.approx(size, abs=0.005)
        assert sum(model.image.values()) / 1e9 == pytest.approx(image, abs=0.005)
        assert sum(model.prompt.values()) / 1e9 == pytest.approx(text, abs=0.005)
    assert models["mask2former"].weights.number / 1e6 == pytest.approx(69, abs=0.5)  # Swin-S in arXiv 2112.01527, table 1


def test_a_caption_is_as_large_as_the_pipeline_makes_it(tmp_path):
    shutil.copytree(pipeline_path(), tmp_path / "whole")
    shutil.copytree(pipeline_path(), tmp_path / "none", ignore=shutil.ignore_patterns("text_encoder_3", "tokenizer_3"))
    index = json.loads((tmp_path / "none" / "model_index.json").read_text())
    index["text_encoder_3"] = index["tokenizer_3"] = [None, None]
    (tmp_path / "none" / "model_index.json").write_text(json.dumps(index))
    for folder in ("whole", "none"):
        pipeline = load_pipeline("playground", revision=None, dtype="float32", device=CPU)
        if folder == "none":
            pipeline.text_encoder_3 = pipeline.tokenizer_3 = None
        real = SD3(pipeline).encode(["two crosses"])
        geometry = find_geometry(str(tmp_path / folder))
        given = conditioning(geometry, SD3(build_pipeline(geometry, "float32")))
        assert {k: (x.shape, x.dtype) for k, x in real.distinct.items()} == {k: (x.shape, x.dtype) for k, x in given.distinct.items()}


def without_numbers(dtype, rows):
    """The playground's policy on the meta device, and a batch for it."""
    geometry = find_geometry("playground")
    model = SD3(build_pipeline(geometry, dtype))
    with torch.device("meta"):
        policy = Policy(model, rank=32, alpha=64, seed=0)
    return ready(policy, batch(model, conditioning(geometry, model), rows))


def with_numbers(dtype, shapes):
    """The playground's policy, and a batch of the same shapes."""
    policy = build_policy(load_recipe("playground", [f"model.dtype={dtype}"]), World(0, 1, CPU))
    given = Conditioning({k: torch.rand(x.shape).to(x.dtype) for k, x in shapes.conditioning.distinct.items()}, shapes.conditioning.rows)
    return ready(policy, TrainingBatch(*(torch.rand(x.shape) for x in (shapes.x0, shapes.eps, shapes.t, shapes.advantages)), given))


def ready(policy, rows):
    """The old policy has its own pass, its merged weights made before."""
    policy.changed()
    with torch.no_grad():
        policy.velocity("old", rows.x0, rows.t, rows.conditioning)
    return policy, rows


def test_training_saves_and_costs_on_the_meta_device_what_it_does_on_a_cpu():
    meta, shapes = without_numbers("float32", 5)
    real, numbers = with_numbers("float32", shapes)
    computed = train_work(meta, shapes, True)

    def own_hooks():
        """Bytes of all storages that autograd is handed, but those of weights and of the batch."""
        known = {x.untyped_storage().data_ptr() for x in real.model.network.state_dict().values()}
        known |= {x.untyped_storage().data_ptr() for x in (numbers.x0, numbers.eps, numbers.t, *numbers.conditioning.distinct.values())}
        kept = {}

        def pack(x):
            if x.untyped_storage().data_ptr() not in known:
                kept[x.untyped_storage().data_ptr()] = (x.untyped_storage().nbytes(), x.detach())
            return x.detach()

        from flowtilt.objectives.nft import NFT

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
            NFT(beta=1.0, advantage_clip=5.0, kl=1.0, old_policy="linear").loss(real, numbers)[0].sum()
        return sum(size for size, _ in kept.values())

    assert costs(load_recipe("playground", ["model.dtype=float32"])).lora.number == sum(p.numel() for p in real.parameters)
    assert computed.saved == own_hooks()
    actual = train_work(real, numbers, True)
    assert computed.flops == actual.flops and computed.alive.tolist() == actual.alive.tolist()


def test_a_half_precision_base_differs_from_a_cpu_in_the_norms_statistics_alone():
    # layer norm keeps two fp32 numbers a token on a GPU, as on the meta device, and on a CPU two of the base's precision
    meta, shapes = without_numbers("bfloat16", 5)
    computed, actual = train_work(meta, shapes, True), train_work(*with_numbers("bfloat16", shapes), True)
    assert computed.flops == actual.flops
    assert 0 <= computed.saved - actual.saved < 0.002 * actual.saved


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_line_through_few_rows_holds_for_many(dtype):
    found = costs(load_recipe("playground", [f"model.dtype={dtype}", "objective.kl=1"]))
    measured, drawn = train_work(*without_numbers(dtype, 50), True), found.train.at(50)
    assert drawn.flops == pytest.approx(measured.flops) and (drawn.peak, drawn.saved) == (measured.peak, measured.saved)
    # without a gradient nothing is fixed: operations are proportional to the rows
    assert not any(found.forward.fixed.flops.values())


# a run --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "overrides",
    [
        (),
        ("objective.kl=0.1", "rollout.guidance=2.0", "rollout.solver=heun"),
        ('objective.old_policy="copy"', "objective.times_per_image=3", "optimizer.steps_per_rollout=5", "objective.kl=1e-4"),
        ('objective.old_policy="delayed"', 'rollout.solver="dpm2"', "rollout.steps=3", 'objective.times="rollout"'),
        ('objective.old_policy="copy"', "optimizer.steps_per_rollout=1"),
        ("objective.type=ram", "objective.times_per_image=2"),
        ("objective.type=awm", "objective.times_per_image=2", "objective.kl=0", "objective.norm_guard=0.1"),
    ],
    ids=lambda words: " ".join(words) or "as it is",
)
def test_network_evaluations_are_those_that_a_run_logs(tmp_path, overrides):
    recipe = quick(tmp_path / "run", "rollout.prompts=2", "rollout.images_per_prompt=3", *overrides)
    trainer = Trainer(recipe)
    logged = [trainer._step()["network_evaluations"] for _ in range(3)]
    planned = [passes_of(recipe, step).evaluations for step in (1, 2, 3)]
    assert logged == [sum(planned[: k + 1]) for k in range(3)]
    work = make_plan(recipe.model_copy(update={"steps": 3}), Machine()).work
    assert sum(effort.evaluations for name, effort in work.items() if name != "evaluate") == logged[-1]


def test_operations_and_bytes_are_those_of_a_real_run_on_a_cpu(tmp_path):
    overrides = ["objective.kl=0.1", "objective.times_per_image=4", "optimizer.steps_per_rollout=1", "rollout.images_per_prompt=6"]
    recipe = quick(tmp_path / "run", "model.dtype=float32", "micro_batch=24", "steps=2", *overrides)
    trainer = Trainer(recipe)
    steps = [measure(trainer._step) for _ in range(2)]
    found = make_plan(recipe, Machine())
    actual = {precision: sum(step.flops[precision] for step in steps) for precision in ("single", "tf32")}
    names = ("sample", "decode", "reward", "train")
    computed = {precision: sum(found.work[name].flops.get(precision, 0) for name in names) for precision in actual}
    captions, rest = divmod(actual["single"] - computed["single"], costs(recipe).encode.flops["single"])
    assert computed["tf32"] == actual["tf32"] and rest == 0 and 1 <= captions <= 12  # each new caption once
    # of what stays, a step makes the gradient and one role's merged weights anew
    anew = costs(recipe).lora.bytes + costs(recipe).merged
    train = next(phase for phase in found.phases if phase.name == "train")
    assert found.peak == train
    assert sum(train.held.values()) + train.activations == pytest.approx(steps[1].peak - anew, rel=0.01)


def test_evaluations_are_those_of_a_run(tmp_path, finished):
    recipe = load_recipe(finished / "recipe.toml")
    assert evaluations_in_all(recipe) == len((finished / "evaluations.jsonl").read_text().splitlines()) == 3
    assert evaluations_in_all(recipe.model_copy(update={"steps": 5})) == 4  # 0, 2, 4 and the last
    never = recipe.model_copy(update={"evaluate": recipe.evaluate.model_copy(update={"every": 0})})
    assert evaluations_in_all(never) == 2


# memory, hours, the page --------------------------------------------------------------------------


def test_the_micro_batch_falls_with_less_memory_and_says_where_nothing_fits():
    recipe = load_recipe("sd35m")
    plans = [make_plan(recipe, Machine(gpus=8, memory=memory)) for memory in (141, 80, 48, 40, 24)]
    found = [one.micro_batch for one in plans]
    assert found == sorted(found, reverse=True) and len(set(found)) >= 4 and set(found) <= set(sizes(recipe))
    for one in (one for one in plans if one.fits):
        assert one.peak.total <= 0.9 * one.machine.gib * GIB
    small = make_plan(recipe, Machine(gpus=8, memory=16))
    assert not small.fits and small.micro_batch == 1
    assert f"DOES NOT FIT: {small.peak.name} needs {small.peak.total / GIB:.1f} GiB" in summary(small)
    fixed = make_plan(load_recipe("sd35m", ["micro_batch=3"]), Machine(gpus=8))
    assert fixed.micro_batch == 3 and "micro-batch 3 (given)" in table(fixed)


def test_a_phase_is_the_sum_of_its_parts_and_more_gpus_hold_less():
    one, eight = (make_plan(load_recipe("sd35m-geneval"), Machine(gpus=gpus)) for gpus in (1, 8))
    for phase in one.phases:
        assert phase.total == pytest.approx(sum(one.resident.values()) + sum(phase.held.values()) + phase.activations)
    assert one.resident["CUDA context"] == CONTEXT
    assert one.resident["lora (current, old, ema)"] == 3 * one.weights["lora, rank 32"].bytes
    assert sum(sum(phase.held.values()) for phase in eight.phases) < sum(sum(phase.held.values()) for phase in one.phases) / 4
    assert one.hours == pytest.approx(8 * eight.hours)  # linear, as said
    assert make_plan(load_recipe("sd35m-geneval"), Machine(utilisation=0.2)).hours == pytest.approx(2 * one.hours)
    # DiffusionNFT's step: 1152 images x (10 + 9 x (3 forwards and a backward)), about four fifths of it training
    forward = sum(one.costs.forward.each.flops.values())
    a_step = sum(sum(one.work[name].flops.values()) for name in ("sample", "train")) / one.recipe.steps
    assert 46 <= a_step / forward / 1152 <= 55
    assert 0.75 < sum(one.work["train"].flops.values()) / one.recipe.steps / a_step < 0.85


def test_hours_are_operations_at_the_peak_of_their_precision():
    machine = Machine("a100", gpus=2, utilisation=0.5)
    gpu = GPUS["a100"]
    work = {"half": gpu.half * 1e12 * 3600, "tf32": gpu.tf32 * 1e12 * 3600, "single": gpu.single * 1e12 * 3600}
    assert machine.hours(work) == pytest.approx(3)


def test_the_page_shows_what_the_command_printed():
    page = (Path(__file__).parent.parent / "docs" / "plan.md").read_text(encoding="utf-8")
    shown = [block for block in re.findall(r"```text\n(.*?)```", page, re.S) if " on " in block.splitlines()[0]]
    assert len(shown) == 4
    for block in shown:
        name, gpus, gpu = re.match(r"(\S+) on (\d+) x (\S+) of", block).groups()
        # memory may move in the last digit with torch's version, work does not
        said = summary(make_plan(load_recipe(name), Machine(gpu, int(gpus)))).partition(";")[0]
        assert said in " ".join(block.split()), said


@pytest.mark.parametrize("name", recipe_names())
def test_every_recipe_has_a_plan_of_at_most_110_columns(name):
    for machine in (Machine("4090"), Machine(gpus=8)):
        found = make_plan(load_recipe(name), machine)
        lines = table(found).splitlines()
        assert max(map(len, lines)) <= 110
        assert "computed, none is measured" in lines[0] and name in lines[0]
        json.dumps(found.as_json(), allow_nan=False)


def test_rewards_that_are_not_counted_are_named():
    recipe = load_recipe(
        "sd35m", ['rewards={ocr = 1.0, far = "http://host:1", mine = "a.py:f", unifiedreward = 1.0}', "evaluate.rewards=[]"]
    )
    found = make_plan(recipe, Machine())
    assert set(found.beside) == {"ocr", "far", "mine", "unifiedreward"} and found.work["reward"].flops == {}
    assert "an image and core" in found.beside["ocr"]


def test_the_command_prints_a_table_or_json(capsys):
    said = typed(capsys, "playground", "steps=3", "--gpus", "2", "--gpu", "4090")
    assert said.startswith("playground on 2 x 4090 of 24 GiB") and "playground: 3 rollouts of 18 x 8 images = " in said
    told = json.loads(typed(capsys, "playground", "--json", "--gpu-memory", "10"))
    assert told["figures"] == "computed, not measured" and told["machine"]["memory"] == 10 * GIB
    assert told["hours"] == pytest.approx(sum(part["hours"] for part in told["work"].values()))


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["playground", "--gpu", "abacus"], "there are h100, h200, a100, l40s, 4090, 3090"),
        (["playground", "--gpus", "0"], "at least 1"),
        (["playground", "--gpu-memory", "0"], "--gpu-memory must be more than 0"),
        (["playground", "--gpu-memory", "nan"], "--gpu-memory must be more than 0"),
        (["playground", "--utilisation", "1.2"], "--utilisation must be above 0 and at most 1"),
        (["playground", "model=nobody/knows-this"], "give the folder, or download it first"),
        (["playground", "model=no/such/folder"], "neither a folder nor in the hub's cache"),
        (["playground", "model=."], "no model_index.json there"),
        (["sd35m", "model.resolution=100"], "not a multiple of 16"),
    ],
)
def test_a_mistake_is_one_line(capsys, tmp_path, monkeypatch, words, said):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError) as raised:
        typed(capsys, *words)
    assert said in str(raised.value) and "\n" not in str(raised.value)


def test_a_folder_that_is_another_pipeline_or_broken_is_refused(tmp_path):
    (tmp_path / "model_index.json").write_text('{"_class_name": "FluxPipeline"}')
    with pytest.raises(UserError, match="this is a FluxPipeline"):
        find_geometry(str(tmp_path))
    (tmp_path / "model_index.json").write_text("{")
    with pytest.raises(UserError, match="not JSON"):
        find_geometry(str(tmp_path))
    (tmp_path / "model_index.json").write_text('{"_class_name": "StableDiffusion3Pipeline", "transformer": ["diffusers", "x"]}')
    with pytest.raises(UserError, match="can't be read"):
        find_geometry(str(tmp_path))


def test_a_pipeline_in_the_hubs_cache_is_read_from_there(tmp_path, monkeypatch):
    snapshot = tmp_path / "models--some--model" / "snapshots" / "abc"
    shutil.copytree(pipeline_path(), snapshot, ignore=shutil.ignore_patterns("*.safetensors"))
    refs = tmp_path / "models--some--model" / "refs"
    refs.mkdir()
    (refs / "main").write_text("abc")
    import huggingface_hub

    original = huggingface_hub.try_to_load_from_cache
    monkeypatch.setattr(huggingface_hub, "try_to_load_from_cache", lambda *args, **kwargs: original(*args, cache_dir=tmp_path, **kwargs))
    assert find_geometry("some/model").transformer == find_geometry("playground").transformer
    with pytest.raises(UserError, match="download it first"):
        find_geometry("some/model", revision="another")
