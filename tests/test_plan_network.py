"""`flowtilt plan` counts what the code does: on the playground to the unit, published sizes elsewhere."""

import json
import shutil
from weakref import WeakSet

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from flowtilt import load_recipe
from flowtilt.build import build_policy
from flowtilt.config import recipe_names
from flowtilt.distributed.world import World
from flowtilt.models.conditioning import Conditioning
from flowtilt.models.opening import load_pipeline
from flowtilt.models.sd3 import SD3
from flowtilt.objectives.batches import TrainingBatch
from flowtilt.objectives.nft import NFT
from flowtilt.plan.components import build_pipeline
from flowtilt.plan.geometry import find_geometry
from flowtilt.plan.judges import judging
from flowtilt.plan.meter import measure
from flowtilt.plan.network import batch, conditioning, costs_of, training, weights_of
from flowtilt.plan.shapes import outcome
from flowtilt.playground import pipeline_path
from flowtilt.policy.lora import LoraPolicy
from flowtilt.rewards.named import parse

CPU = torch.device("cpu")
aten = torch.ops.aten
MEDIUM = "stabilityai/stable-diffusion-3.5-medium"


def costs(recipe):
    return costs_of(recipe.model, recipe.lora.rank, recipe.lora.alpha)


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


def test_an_operation_that_was_seen_gives_what_it_would_anew():
    x = torch.empty(4, 6, device="meta")
    for _ in range(2):
        product, view, both = (
            outcome(f, a, {}, [x]) for f, a in ((aten.mm.default, (x, x.t())), (aten.t.default, (x,)), (aten.topk.default, (x, 2)))
        )
        assert (product.shape, product.dtype, product.is_meta) == ((4, 4), torch.float32, True)
        assert view.untyped_storage()._cdata == x.untyped_storage()._cdata and view.stride() == (1, 6)
        assert [(one.shape, one.dtype) for one in both] == [((4, 2), torch.float32), ((4, 2), torch.int64)]
        assert outcome(aten.mul.Tensor, (x, 2), {}, [x]).dtype == torch.float32
        whole = torch.empty(4, device="meta", dtype=torch.long)
        assert [outcome(aten.mul.Tensor, (whole, y), {}, [whole]).dtype for y in (2, 2.0, True)] == [
            torch.int64,
            torch.float32,
            torch.int64,
        ]
        assert outcome(aten.add_.Tensor, (x, x), {}, [x, x]) is x


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
    medium = build_pipeline(find_geometry(MEDIUM), "bfloat16")
    published = {"transformer": 4.94, "text_encoder": 0.247, "text_encoder_2": 1.39, "text_encoder_3": 4.99 + 4.53, "vae": 0.168}
    assert {name: pytest.approx(gigabytes(getattr(medium, name)), rel=3e-3) for name in published} == published
    # total_size in stable-diffusion-3.5-large's index of its transformer's files, to the byte; stable-diffusion-3-medium's one file
    large = build_pipeline(find_geometry("stabilityai/stable-diffusion-3.5-large"), "bfloat16")
    assert 2 * weights_of(large.transformer).number == 16_292_561_536
    small = build_pipeline(find_geometry("stabilityai/stable-diffusion-3-medium-diffusers"), "bfloat16")
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
        given = conditioning(SD3(build_pipeline(geometry, "float32")))
        assert {k: (x.shape, x.dtype) for k, x in real.distinct.items()} == {k: (x.shape, x.dtype) for k, x in given.distinct.items()}


def without_numbers(dtype, rows, recompute=False):
    """The playground's policy on the meta device, and a batch for it."""
    geometry = find_geometry("playground")
    model = SD3(build_pipeline(geometry, dtype))
    with torch.device("meta"):
        policy = LoraPolicy(model, rank=32, alpha=64, seed=0)
    return ready(policy, batch(model, conditioning(model), rows), recompute)


def with_numbers(dtype, shapes, recompute=False):
    """The playground's policy, and a batch of the same shapes."""
    policy = build_policy(load_recipe("playground", [f"model.dtype={dtype}"]), World(0, 1, CPU))
    rows = torch.zeros(len(shapes), dtype=torch.long)
    given = Conditioning({k: torch.rand(x.shape).to(x.dtype) for k, x in shapes.conditioning.distinct.items()}, rows)
    x0, eps, t, advantages = (torch.rand(x.shape) for x in (shapes.x0, shapes.eps, shapes.t, shapes.advantages))
    return ready(policy, TrainingBatch(x0, eps, t, advantages, given), recompute)


def ready(policy, rows, recompute):
    """The old policy has its own pass, its weights made before."""
    policy.changed()
    policy.recompute(recompute)
    with torch.no_grad():
        policy.velocity("old", rows.x0, rows.t, rows.conditioning)
    return policy, rows


class Saved:
    """Bytes of what autograd is handed and still has, but for weights and the batch, and of what its checkpoints are given."""

    def __init__(self, policy, rows):
        own = [*policy.model.network.state_dict().values(), rows.x0, rows.eps, rows.t, *rows.conditioning.distinct.values()]
        self.known = {x.untyped_storage().data_ptr() for x in own}
        self.held = WeakSet()
        self.given = {}
        for block in policy.model.blocks if policy.model.network.is_gradient_checkpointing else ():
            block.register_forward_pre_hook(self.enter, with_kwargs=True)

    def enter(self, block, args, kwargs):
        if torch.is_grad_enabled():
            inputs = [x for x in (*args, *kwargs.values()) if isinstance(x, torch.Tensor)]
            assert len(inputs) == 3  # image, caption, time
            self.given |= {x.untyped_storage().data_ptr(): x for x in inputs}

    def pack(self, x):
        class Box:
            tensor = x.detach()

        box = Box()
        self.held.add(box)
        return box

    def bytes(self):
        found = {x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in (box.tensor for box in self.held)}
        found |= {pointer: x.untyped_storage().nbytes() for pointer, x in self.given.items()}
        return sum(size for pointer, size in found.items() if pointer not in self.known)


@pytest.mark.parametrize("recompute", [False, True])
def test_training_saves_and_costs_on_the_meta_device_what_it_does_on_a_cpu(recompute):
    meta, shapes = without_numbers("float32", 5, recompute)
    real, numbers = with_numbers("float32", shapes, recompute)
    computed, actual = measure(training(meta, shapes, True)), measure(training(real, numbers, True))
    assert computed.flops == actual.flops and computed.alive.tolist() == actual.alive.tolist()
    saved = Saved(real, numbers)
    with torch.autograd.graph.saved_tensors_hooks(saved.pack, lambda box: box.tensor):
        loss, _ = NFT(beta=1.0, advantage_clip=5.0, kl=1.0, old_policy="linear").loss(real, numbers)
        loss = loss.sum()
    injected_weights = sum(weight.nbytes for weight in real._weights_for("old").values()) if recompute else 0
    # a checkpoint holds the merged weights for its block; without one they are among what autograd has
    assert computed.saved == saved.bytes() + injected_weights
    assert costs(load_recipe("playground", ["model.dtype=float32"])).trained.number == sum(p.numel() for p in real.parameters)


def test_recomputing_costs_one_more_forward_pass_of_the_blocks_and_saves_memory():
    found = costs(load_recipe("sd35m-geneval"))
    plain, anew = found.train(True, False).each, found.train(True, True).each
    more = sum(anew.flops.values()) - sum(plain.flops.values())
    assert 0.98 < more / sum(found.forward.each.flops.values()) < 1  # not what is outside the blocks, nor a block's last product
    # what enters 24 blocks: 1024 image tokens and 205 of the caption, 1536 wide, in 16 bits; and little beside
    inputs = 24 * (1024 + 205) * 1536 * 2
    assert inputs < anew.saved < 1.06 * inputs and plain.saved > 20 * anew.saved


def test_a_half_precision_base_differs_from_a_cpu_in_the_norms_statistics_alone():
    # layer norm keeps two fp32 numbers a token on a GPU, as on the meta device, and on a CPU two of the base's precision
    meta, shapes = without_numbers("bfloat16", 5)
    computed, actual = (measure(training(*one, True)) for one in ((meta, shapes), with_numbers("bfloat16", shapes)))
    assert computed.flops == actual.flops
    assert 0 <= computed.saved - actual.saved < 0.002 * actual.saved


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_what_is_told_by_rows_holds_for_any_number(dtype, recompute):
    found = costs(load_recipe("playground", [f"model.dtype={dtype}", "objective.kl=1"]))
    measured, drawn = measure(training(*without_numbers(dtype, 50, recompute), True)), found.train(True, recompute).at(50)
    assert drawn.flops == pytest.approx(measured.flops) and (drawn.peak, drawn.saved) == (measured.peak, measured.saved)
    # without a gradient nothing is fixed: operations are proportional to the rows
    assert not any(found.forward.fixed.flops.values())


def test_every_recipe_of_sd35_medium_has_its_published_shapes():
    recipes = [load_recipe(name) for name in recipe_names() if name.startswith("sd35m")]
    (settings,) = {(r.model.path, r.model.t5_length, r.model.resolution) for r in recipes}
    geometry = find_geometry(settings[0])
    model = SD3(build_pipeline(geometry, "bfloat16"), t5_length=settings[1], resolution=settings[2])
    block = model.network.transformer_blocks
    assert len(block) == 24 and [b.attn2 is not None for b in block] == [True] * 13 + [False] * 11  # MMDiT-X
    assert model.network.inner_dim == 1536 and block[0].attn.heads == 24
    assert model.latent_shape == (16, 64, 64) and model.protocol["shift"] == 3.0  # 512 pixels
    shapes = {name: tuple(x.shape) for name, x in conditioning(model).distinct.items()}
    assert shapes == {"encoder_hidden_states": (1, 77 + 128, 4096), "pooled_projections": (1, 2048)}
    # r (1536 + 1536) for each of 8 layers in 24 blocks; the last has nothing to add to the caption
    for rank, alpha in {(r.lora.rank, r.lora.alpha) for r in recipes}:
        alike = load_recipe("sd35m", [f"lora.rank={rank}", f"lora.alpha={alpha}"])
        assert costs(alike).trained.number == rank * 3072 * (8 * 24 - 1)
