"""Fused RMSNorm: nearer to the exact value than diffusers' chain, same gradient within rounding, found in a network of the true class."""

import pytest
import torch
from diffusers.models.normalization import RMSNorm
from torch import nn

from flowtilt.config import load_recipe
from flowtilt.errors import UserError
from flowtilt.models.fused_norm import FusedRMSNorm, fuse_norms
from flowtilt.models.opening import open_model

CPU = torch.device("cpu")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_one_kernel_is_nearer_to_the_exact_value(dtype):
    rng = torch.Generator().manual_seed(0)
    norm = RMSNorm(64, eps=1e-6)
    norm.weight.data = 1 + 0.2 * torch.randn(64, generator=rng)
    network = nn.Sequential(norm.to(dtype))
    x = (3 * torch.randn(4, 50, 64, generator=rng)).to(dtype).requires_grad_()
    wide = x.detach().double().requires_grad_()
    exact = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + 1e-6) * norm.weight.double()
    weights = torch.randn(4, 50, 64, generator=rng)
    (slope,) = torch.autograd.grad((weights * exact).sum(), wide)

    def errors():
        out = network(x)
        (own,) = torch.autograd.grad((weights * out.float()).sum(), x)
        return [float((found.detach().double() - right).square().mean().sqrt()) for found, right in ((out, exact), (own, slope))]

    before = errors()
    assert fuse_norms(network) == 1 and fuse_norms(network) == 0
    after = errors()
    assert after[0] < 0.9 * before[0] and after[1] < 1.1 * before[1]
    assert network(x).dtype == dtype


def test_a_recipe_is_refused_where_there_is_nothing_to_fuse():
    with pytest.raises(UserError, match="no RMSNorm of diffusers in half precision"):
        open_model(load_recipe("playground", ["model.fuse_norms=true"]).model, CPU)


def test_an_sd3_network_with_normalised_queries_and_keys_predicts_the_same_within_rounding():
    from diffusers import SD3Transformer2DModel

    torch.manual_seed(0)
    network = SD3Transformer2DModel(
        sample_size=8, patch_size=2, in_channels=4, num_layers=2, attention_head_dim=8, num_attention_heads=2, joint_attention_dim=16,
        caption_projection_dim=16, pooled_projection_dim=8, out_channels=4, pos_embed_max_size=8, qk_norm="rms_norm",
    ).to(torch.bfloat16)  # fmt: skip
    given = {
        "hidden_states": torch.randn(2, 4, 8, 8),
        "encoder_hidden_states": torch.randn(2, 5, 16),
        "pooled_projections": torch.randn(2, 8),
        "timestep": torch.tensor([300.0, 800.0]),
    }
    given = {name: value.to(torch.bfloat16) for name, value in given.items()}
    with torch.no_grad():
        before = network(**given).sample.float()
        number = sum(type(module) is RMSNorm for module in network.modules())
        assert fuse_norms(network) == number > 0
        assert all(type(module) is not RMSNorm for module in network.modules())
        assert any(isinstance(module, FusedRMSNorm) for module in network.modules())
        after = network(**given).sample.float()
    assert float((after - before).norm() / before.norm()) < 0.02
