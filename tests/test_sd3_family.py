"""Stable Diffusion 3 at its published sizes: shapes on the meta device, and one narrow block of SD3.5-Medium with numbers."""

from dataclasses import replace
from functools import cache

import pytest
import torch
from diffusers import SD3Transformer2DModel
from meta_shapes import Shapes

from flowtilt.models.conditioning import Conditioning
from flowtilt.models.sd3 import SD3
from flowtilt.plan.components import build_pipeline
from flowtilt.plan.geometry import find_geometry
from flowtilt.plan.network import conditioning
from flowtilt.policy.lora import LoraPolicy

PUBLISHED = {  # blocks, second attentions, normalised queries and keys
    "stabilityai/stable-diffusion-3-medium-diffusers": (24, 0, False),
    "stabilityai/stable-diffusion-3.5-medium": (24, 13, True),
    "stabilityai/stable-diffusion-3.5-large": (38, 0, True),
}


@cache
def at_full_size(name, resolution, t5_length):
    model = SD3(build_pipeline(find_geometry(name), "bfloat16"), resolution=resolution, t5_length=t5_length)
    with torch.device("meta"):
        policy = LoraPolicy(model, rank=32, alpha=64.0, seed=0)
    return model, policy


@pytest.mark.parametrize(
    ("resolution", "t5_length", "name"), [*((512, None, name) for name in PUBLISHED), (None, 256, next(iter(PUBLISHED)))]
)
def test_a_velocity_has_the_shape_of_the_latents(name, resolution, t5_length):
    model, policy = at_full_size(name, resolution, t5_length)
    side = (resolution or 1024) // 8
    assert model.latent_shape == (16, side, side) and model.protocol["shift"] == 3.0 and model.t5_length == (t5_length or 128)
    given = conditioning(model)
    assert given.distinct["encoder_hidden_states"].shape == (1, 77 + (t5_length or 128), 4096)
    x, t = torch.empty(2, *model.latent_shape, device="meta"), torch.empty(2, device="meta")
    with Shapes():
        v = policy.velocity("current", x, t, given.select(torch.zeros(2, dtype=torch.long)))
    assert v.shape == x.shape and v.dtype == torch.float32 and v.requires_grad


@pytest.mark.parametrize("name", PUBLISHED)
def test_loras_go_on_the_eight_projections_of_each_joint_attention_and_nowhere_else(name):
    number, second, normalised = PUBLISHED[name]
    model, policy = at_full_size(name, 512, None)
    modules = [module for module, _ in model.network.named_modules()]
    assert len(model.blocks) == number and sum(module.endswith(".attn2") for module in modules) == second
    assert any(module.endswith("attn.norm_q") for module in modules) == normalised
    adapted = set(policy._layers)
    expected = {f"transformer_blocks.{k}.{target}" for k in range(number) for target in SD3.lora_targets}
    # what the last block makes of the caption is read by nobody
    assert adapted == expected - {f"transformer_blocks.{number - 1}.attn.to_add_out"}


def test_a_block_of_sd35_medium_trains_in_bfloat16_to_the_same_bits_when_recomputed():
    geometry = find_geometry("stabilityai/stable-diffusion-3.5-medium")
    kind, published = geometry.components["transformer"]
    # block 0, with its second attention, and a last one; narrow and with few tokens, as half precision is slow on many CPUs
    narrow = {"num_attention_heads": 8, "caption_projection_dim": 512}
    small = {**published, "num_layers": 2, "dual_attention_layers": (0,), "pos_embed_max_size": 16, **narrow}
    pipeline = build_pipeline(replace(geometry, components={**geometry.components, "transformer": (kind, small)}), "bfloat16")
    torch.manual_seed(0)
    pipeline.transformer = SD3Transformer2DModel(**small).to(torch.bfloat16).requires_grad_(False)
    model = SD3(pipeline, resolution=64)
    policy = LoraPolicy(model, rank=32, alpha=64.0, seed=0)
    rng = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, weight in policy._weights["current"].items():
            if "lora_B" in name:
                weight.normal_(0, 0.02, generator=rng)
    policy.changed()

    def random(*shape):
        return torch.randn(*shape, generator=rng)

    captions = {"encoder_hidden_states": random(1, 12, 4096).bfloat16(), "pooled_projections": random(1, 2048).bfloat16()}
    x, t, given = random(1, *model.latent_shape), torch.tensor([0.6]), Conditioning(captions, torch.zeros(1, dtype=torch.long))
    found = []
    for on in (False, True):
        policy.recompute(on)
        for p in policy.parameters:
            p.grad = None
        v = policy.velocity("current", x, t, given)
        v.square().mean().backward()
        found.append((v.detach(), [p.grad.clone() for p in policy.parameters]))
    (v, gradients), (again, recomputed) = found
    assert torch.equal(v, again) and all(torch.equal(a, b) for a, b in zip(gradients, recomputed, strict=True))
    assert v.dtype == torch.float32 and v.isfinite().all()
    assert all(g.dtype == torch.float32 and g.isfinite().all() for g in gradients)
    whole = [name for name in policy.state("current") if name.startswith("transformer_blocks.0.")]
    assert all(g.any() for name, g in zip(policy.state("current"), gradients, strict=True) if name in whole)
    with torch.no_grad():
        assert not torch.equal(policy.velocity("reference", x, t, given), v)
