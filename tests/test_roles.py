"""Roles on grounds of their own: LoRAs frozen beneath the trained one, a second one trained beside it, and the bare teacher."""

from itertools import product

import pytest
import torch
from test_lora import random_lora

from flowtilt.errors import UserError
from flowtilt.lora import Lora
from flowtilt.lora.fit import shapes_of
from flowtilt.models.opening import load_pipeline
from flowtilt.models.sd3 import SD3
from flowtilt.policy.lora import LoraPolicy
from flowtilt.policy.tuned_model import TunedModel

COLD = {"mixed": True, "seed": 1}
BENEATH_FAKE = {"rank": 2, "alpha": 3.0, "seed": 2, "ends": ("to_k", "to_v")}
TEXTS = ["a red circle", "two crosses", "a red circle"]
CLOSE = {"atol": 2e-5, "rtol": 1e-4}
each_way = pytest.mark.parametrize("merge", [True, False])


def model(dtype="float32"):
    return SD3(load_pipeline("playground", revision=None, dtype=dtype, device=torch.device("cpu")))


@pytest.fixture(scope="module")
def bare():
    return model()


@pytest.fixture(scope="module")
def shapes(bare):
    return shapes_of(bare.network)


@pytest.fixture(scope="module")
def inputs():
    return torch.randn(3, 8, 8, 8, generator=torch.Generator().manual_seed(0)), torch.tensor([0.1, 0.5, 0.99])


def build(shapes, merge, dtype="float32", moved=True):
    """A policy on a stack, with a fake score on another one; `moved` gives both LoRAs a B."""
    policy = LoraPolicy(model(dtype), rank=4, alpha=16.0, seed=0, merge=merge, base_loras=[random_lora(shapes, **COLD)])
    policy.add_role("fake", 0, [random_lora(shapes, **BENEATH_FAKE)])
    rng = torch.Generator().manual_seed(5)
    for role in ("current", "fake") if moved else ():
        state = policy.state(role)
        policy.load_state(role, {n: torch.randn(x.shape, generator=rng) * 0.1 if "lora_B" in n else x for n, x in state.items()})
    return policy


def drawn(policy, role, inputs):
    with torch.no_grad():
        return policy.velocity(role, *inputs, policy.model.encode(TEXTS))


def own(policy, role):
    """A role's weights as a LoRA."""
    state = policy.state(role)
    layers = {n.removesuffix(".lora_A.weight"): (a, state[n.replace("lora_A", "lora_B")]) for n, a in state.items() if "lora_A" in n}
    return Lora(layers, dict.fromkeys(layers, 16.0), role)


# what each role draws ----------------------------------------------------------------------------------


@pytest.mark.parametrize("moved", [True, False])
def test_merged_each_role_is_its_stack_to_the_bit(bare, shapes, inputs, moved):
    policy = build(shapes, merge=True, moved=moved)
    cold, fake = random_lora(shapes, **COLD), random_lora(shapes, **BENEATH_FAKE)
    stacks = {"reference": [cold], "current": [cold, own(policy, "current")], "fake": [fake, own(policy, "fake")], "teacher": []}
    for role, loras in stacks.items():
        assert torch.equal(drawn(policy, role, inputs), drawn(TunedModel(bare, loras), "tuned" if loras else "base", inputs)), role


@each_way
def test_before_training_every_role_is_its_ground(shapes, inputs, merge):
    policy = build(shapes, merge, moved=False)
    reference = drawn(policy, "reference", inputs)
    for role in ("current", "old", "ema"):
        torch.testing.assert_close(drawn(policy, role, inputs), reference, **(dict(atol=0, rtol=0) if merge else CLOSE))
    for one, other in (("reference", "teacher"), ("fake", "reference"), ("fake", "teacher")):
        assert (drawn(policy, one, inputs) - drawn(policy, other, inputs)).abs().max() > 0.05, (one, other)


def test_unmerged_roles_are_the_merged_ones_to_rounding(shapes, inputs):
    merged, joint = build(shapes, merge=True), build(shapes, merge=False)
    for role in (*merged.roles, "reference", "teacher"):
        torch.testing.assert_close(drawn(joint, role, inputs), drawn(merged, role, inputs), **CLOSE)


def test_in_half_precision_the_reference_is_as_near_to_the_exact_one_as_the_stack_is(bare, shapes, inputs):
    cold = [random_lora(shapes, **COLD)]
    policy, stack = build(shapes, None, "bfloat16"), TunedModel(model("bfloat16"), cold)
    assert not policy.merge
    exact = drawn(TunedModel(bare, cold), "tuned", inputs)
    ours, theirs = ((drawn(*each, inputs) - exact).abs().mean() for each in ((policy, "reference"), (stack, "tuned")))
    assert ours < 1.2 * theirs < 0.1 * (exact - drawn(policy, "teacher", inputs)).abs().mean()
    assert torch.equal(drawn(policy, "teacher", inputs), drawn(stack, "base", inputs))


@each_way
def test_a_role_that_was_asked_before_sees_its_new_weights_and_no_other_does(shapes, inputs, merge):
    policy = build(shapes, merge, moved=False)
    before = {role: drawn(policy, role, inputs) for role in (*policy.roles, "reference", "teacher")}
    with torch.no_grad():
        for name, weight in policy._weights["fake"].items():
            if "lora_B" in name:
                weight += 0.05
    policy.changed("fake")
    changed = {role for role, v in before.items() if not torch.equal(drawn(policy, role, inputs), v)}
    assert changed == {"fake"}


# gradients ---------------------------------------------------------------------------------------------


def all_gradients(policy):
    """By role and name, of whatever has one."""
    return {(role, n): w.grad for role in policy.roles for n, w in policy._weights[role].items() if w.grad is not None and w.grad.any()}


@pytest.mark.parametrize(("merge", "role"), [*product([True, False], ["current", "fake"])])
def test_a_loss_reaches_its_own_role_alone(shapes, inputs, merge, role):
    policy = build(shapes, merge)
    policy.velocity(role, *inputs, policy.model.encode(TEXTS)).square().mean().backward()
    found = all_gradients(policy)
    assert {one for one, _ in found} == {role}
    assert len(found) >= len(policy._weights[role]) - 4  # of the last block the caption's output is not used
    trained = {id(weight) for weight in policy.parameters}
    assert all(p.grad is None for p in policy.model.network.parameters() if id(p) not in trained)


@each_way
def test_roles_without_training_record_nothing_and_count_one_forward(shapes, inputs, merge):
    policy = build(shapes, merge)
    given = policy.model.encode(TEXTS)
    for role in ("old", "ema", "reference", "teacher"):
        before = policy.evaluations
        assert not policy.velocity(role, *inputs, given).requires_grad and policy.evaluations == before + 3
    for role in ("current", "fake"):
        before = policy.evaluations
        assert policy.velocity(role, *inputs, given).requires_grad and policy.evaluations == before + 9


@pytest.mark.parametrize(("merge", "dtype"), [(True, "float32"), (False, "float32"), (False, "bfloat16")])
def test_recomputing_knows_the_role_of_each_forward_whatever_is_asked_before_the_backward(shapes, inputs, merge, dtype):
    policy = build(shapes, merge, dtype)
    given = policy.model.encode(TEXTS)
    found = []
    for on in (False, True):
        policy.recompute(on)
        for role in ("current", "fake"):
            for weight in policy._weights[role].values():
                weight.grad = None
        student = policy.velocity("current", *inputs, given)
        with torch.no_grad():
            teacher = policy.velocity("teacher", *inputs, given)
        fake = policy.velocity("fake", *inputs, given)
        with torch.no_grad():
            fake_again, reference = policy.velocity("fake", *inputs, given), policy.velocity("reference", *inputs, given)
        policy.velocity("teacher", *inputs, given)
        (student * (fake_again - teacher)).mean().backward()
        (fake * reference).mean().backward()
        found.append(all_gradients(policy))
    assert found[0].keys() == found[1].keys() and {role for role, _ in found[0]} == {"current", "fake"}
    assert all(torch.equal(gradient, found[1][key]) for key, gradient in found[0].items())


# what is refused, kept, put back -----------------------------------------------------------------------


def test_layers_that_are_not_trained_can_lie_beneath_no_role(shapes):
    beyond = random_lora(shapes, ends=("to_q", "ff.net.2"))
    named = Lora(beyond.layers, beyond.alphas, "the other one")
    with pytest.raises(UserError, match=r"lora the other one: changes \d+ layers that are not trained, transformer_blocks.0.ff.net.2"):
        LoraPolicy(model(), rank=4, alpha=16.0, seed=0, base_loras=[random_lora(shapes, **COLD), named])
    policy = LoraPolicy(model(), rank=4, alpha=16.0, seed=0)
    with pytest.raises(UserError, match="the other one"):
        policy.add_role("fake", 0, [named])


def test_a_further_role_is_saved_and_put_back_and_starts_from_an_a_of_its_own(shapes, inputs):
    policy, other, again = build(shapes, True), build(shapes, True, moved=False), build(shapes, True, moved=False)
    state = policy.state("fake")
    a = {name: x for name, x in other.state("fake").items() if "lora_A" in name}
    assert all(not torch.equal(x, other.state("current")[name]) for name, x in a.items())
    assert all(torch.equal(x, again.state("fake")[name]) for name, x in a.items())
    drawn(other, "fake", inputs)
    other.load_state("fake", state)
    assert torch.equal(drawn(other, "fake", inputs), drawn(policy, "fake", inputs))
    assert all(torch.equal(x, state[name]) for name, x in other.state("fake").items())
    assert all(w.requires_grad and w.is_leaf for w in other._weights["fake"].values())
    with pytest.raises(UserError, match="weights of fake: 1 tensors do not fit"):
        other.load_state("fake", {name: x for name, x in state.items() if name != min(state)})


def test_equal_weights_on_different_grounds_are_different_policies(shapes):
    policy = build(shapes, True)
    policy.load_state("fake", policy.state("current"))
    assert not policy.same_version("fake", "current")
    policy.load_state("old", policy.state("current"))
    assert policy.same_version("old", "current")
