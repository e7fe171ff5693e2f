"""Roles on one base: merged and unmerged forwards agree, gradients reach only what is trained, base weights never move."""

import pytest
import torch

from flowtilt.errors import UserError
from flowtilt.models.opening import load_pipeline
from flowtilt.models.sd3 import SD3
from flowtilt.policy.lora import LoraPolicy
from flowtilt.policy.roles import ROLES


def build(merge=None, dtype="float32", rank=4, alpha=16.0, blocks=4):
    pipeline = load_pipeline("playground", revision=None, dtype=dtype, device=torch.device("cpu"))
    pipeline.transformer.transformer_blocks = pipeline.transformer.transformer_blocks[-blocks:]
    policy = LoraPolicy(SD3(pipeline), rank=rank, alpha=alpha, seed=0, merge=merge)
    rng = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for role in ROLES:
            for name, weight in policy._weights[role].items():
                if "lora_B" in name:
                    weight.normal_(0, 0.1, generator=rng)
            policy._version[role] = policy._tick()
    return policy


@pytest.fixture(scope="module")
def inputs():
    rng = torch.Generator().manual_seed(0)
    return torch.randn(3, 8, 8, 8, generator=rng), torch.tensor([0.1, 0.5, 0.99]), ["a red circle", "two crosses", "a red circle"]


def gradients(policy, x, t, texts):
    policy.velocity("current", x, t, policy.model.encode(texts)).square().mean().backward()
    return [p.grad.clone() for p in policy.parameters]


def test_merged_and_unmerged_forwards_and_gradients_agree(inputs):
    x, t, texts = inputs
    merged, plain = build(merge=True), build(merge=False)
    given = merged.model.encode(texts)
    for role in (*ROLES, "reference"):
        with torch.no_grad():
            torch.testing.assert_close(merged.velocity(role, x, t, given), plain.velocity(role, x, t, given), atol=2e-5, rtol=1e-4)
    for ours, theirs in zip(gradients(merged, x, t, texts), gradients(plain, x, t, texts), strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=1e-3)


@pytest.mark.parametrize("merge", [True, False])
def test_the_reference_is_the_base_and_forwards_leave_it_alone(inputs, merge):
    x, t, texts = inputs
    untouched = load_pipeline("playground", revision=None, dtype="float32", device=torch.device("cpu"))
    policy = build(merge=merge)
    given = policy.model.encode(texts)
    gradients(policy, x, t, texts)
    with torch.no_grad():
        expected = SD3(untouched).velocity(x, t, given)
        assert torch.equal(policy.velocity("reference", x, t, given), expected)
        assert not torch.allclose(policy.velocity("current", x, t, given), expected, atol=1e-2)
    before = dict(untouched.transformer.named_parameters())
    for name, value in policy.model.network.named_parameters():
        if "lora_" not in name:
            assert torch.equal(value, before[name.replace(".base_layer", "")]), name


@pytest.mark.parametrize("merge", [True, False])
def test_only_the_current_role_is_ever_trained(inputs, merge):
    x, t, texts = inputs
    policy = build(merge=merge)
    given = policy.model.encode(texts)
    for role in ("old", "ema", "reference"):
        assert not policy.velocity(role, x, t, given).requires_grad
    gradients(policy, x, t, texts)
    trained = {id(p) for p in policy.parameters}
    assert all(p.requires_grad == (id(p) in trained) for p in policy.model.network.parameters())
    assert all(p.grad is None for role in ("old", "ema") for p in policy._weights[role].values())


@pytest.mark.parametrize(("dtype", "merge"), [("float32", True), ("float32", False), ("bfloat16", False)])
def test_recomputing_activations_changes_no_bit_whatever_other_roles_do_meanwhile(inputs, dtype, merge):
    x, t, texts = inputs
    policy = build(merge=merge, dtype=dtype)
    given = policy.model.encode(texts)
    found = []
    for on in (False, True):
        policy.recompute(on)
        for p in policy.parameters:
            p.grad = None
        saved = 0

        def count(tensor):
            nonlocal saved
            saved += tensor.nbytes
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
            v = policy.velocity("current", x, t, given)
        with torch.no_grad():  # between forward and backward, as in every objective
            policy.velocity("old", x, t, given)
            policy.velocity("reference", x, t, given)
        v.square().mean().backward()
        found.append(([p.grad.clone() for p in policy.parameters], saved))
    assert all(torch.equal(a, b) for a, b in zip(found[0][0], found[1][0], strict=True))
    assert found[1][1] < found[0][1] / 2


def test_averages_follow_the_current_weights():
    policy = build()
    old, current = policy.state("old"), policy.state("current")
    policy.average("old", 0.75)
    for name, value in policy.state("old").items():
        torch.testing.assert_close(value, 0.75 * old[name] + 0.25 * current[name])
    assert not policy.same_version("old", "current")
    policy.average("old", 0.0)
    assert policy.same_version("old", "current")
    assert all(torch.equal(a, b) for a, b in zip(policy.state("old").values(), policy.state("current").values(), strict=True))
    policy.changed()
    assert not policy.same_version("old", "current")


def test_a_role_that_changed_is_merged_anew(inputs):
    x, t, texts = inputs
    policy = build(merge=True)
    given = policy.model.encode(texts)
    with torch.no_grad():
        first = policy.velocity("old", x, t, given)
        policy.average("old", 0.0)
        assert not torch.allclose(first, policy.velocity("old", x, t, given), atol=1e-3)
        torch.testing.assert_close(policy.velocity("old", x, t, given), policy.velocity("current", x, t, given))


def test_every_role_starts_as_the_base_and_a_seed_gives_the_same_adapters():
    def fresh(seed):
        pipeline = load_pipeline("playground", revision=None, dtype="float32", device=torch.device("cpu"))
        return LoraPolicy(SD3(pipeline), rank=4, alpha=8.0, seed=seed)

    torch.manual_seed(0)
    one = fresh(0)
    torch.manual_seed(99)
    two, other = fresh(0), fresh(1)
    assert all(torch.equal(a, b) for a, b in zip(one.state("current").values(), two.state("current").values(), strict=True))
    assert any(not torch.equal(a, b) for a, b in zip(one.state("current").values(), other.state("current").values(), strict=True))
    assert all(value.abs().max() == 0 for name, value in one.state("current").items() if "lora_B" in name)


def test_weights_of_another_rank_are_refused():
    policy, other = build(rank=4), build(rank=8)
    with pytest.raises(UserError, match="another model or rank"):
        policy.load_state("current", other.state("current"))


def test_a_half_precision_base_computes_the_bits_of_diffusers_with_the_same_lora(inputs, tmp_path):
    x, t, texts = inputs
    policy = build(dtype="bfloat16", alpha=4.0)
    given = policy.model.encode(texts)
    policy.save_lora(str(tmp_path), "ema")
    stock = load_pipeline("playground", revision=None, dtype="bfloat16", device=torch.device("cpu"))
    stock.load_lora_weights(tmp_path)
    with torch.no_grad():
        assert torch.equal(policy.velocity("ema", x, t, given), SD3(stock).velocity(x, t, given))


def test_on_a_half_precision_base_adapters_gradients_and_velocities_stay_fp32(inputs):
    x, t, texts = inputs
    policy = build(dtype="bfloat16", alpha=4.0)
    assert not policy.merge
    given = policy.model.encode(texts)
    assert all(p.dtype == torch.float32 for p in policy.parameters)
    ours, exact = gradients(policy, x, t, texts), gradients(build(alpha=4.0), x, t, texts)
    assert all(g.dtype == torch.float32 for g in ours)
    # the last block's context projections reach nothing, in either precision
    assert [bool(g.any()) for g in ours] == [bool(g.any()) for g in exact]
    whole, apart = (sum(float(g.square().sum()) for g in gs) for gs in (exact, [a - b for a, b in zip(ours, exact, strict=True)]))
    assert apart < 0.01 * whole
    assert policy.velocity("current", x, t, given).dtype == torch.float32


def test_evaluations_are_counted_a_backward_as_two(inputs):
    x, t, texts = inputs
    policy = build()
    given = policy.model.encode(texts)
    with torch.no_grad():
        policy.velocity("old", x, t, given)
    assert policy.evaluations == 3
    policy.velocity("current", x, t, given)
    assert policy.evaluations == 3 + 9
