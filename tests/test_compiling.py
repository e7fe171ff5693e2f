"""Compiled blocks compute the same with any role's weights, and where compiling fails the network is as it was."""

import pytest
import torch
from conftest import quick
from test_policy import build, gradients

from flowtilt import Trainer
from flowtilt.policy.compiling import compile_blocks
from flowtilt.training import trainer


def velocities(policy, inputs):
    x, t, texts = inputs
    given = policy.model.encode(texts)
    with torch.no_grad():
        return [policy.velocity(role, x, t, given) for role in ("current", "old", "reference")]


@pytest.fixture
def inputs():
    rng = torch.Generator().manual_seed(0)
    return torch.randn(3, 8, 8, 8, generator=rng), torch.tensor([0.1, 0.5, 0.99]), ["a red circle", "two crosses", "a red circle"]


def test_traced_blocks_follow_the_roles(inputs):
    from torch._dynamo.utils import counters

    torch._dynamo.reset()
    # the last block and one of the others: two kinds
    plain, compiled = (build(merge=False, dtype="bfloat16", blocks=2) for _ in range(2))
    # "eager" traces, and leaves out the minutes of generating code
    assert compile_blocks(compiled, backend="eager") == ""
    assert compiled.evaluations == 0 and all(p.grad is None for p in compiled.parameters)
    assert all(block._compiled_call_impl is not None for block in compiled.model.blocks)
    graphs = counters["stats"]["unique_graphs"]
    assert all(torch.equal(a, b) for a, b in zip(velocities(plain, inputs), velocities(compiled, inputs), strict=True))
    assert all(torch.equal(a, b) for a, b in zip(gradients(plain, *inputs), gradients(compiled, *inputs), strict=True))
    assert counters["stats"]["unique_graphs"] == graphs > 0, "three images are compiled anew where two have been"
    compiled.average("old", 0.0)
    after = velocities(compiled, inputs)
    assert torch.equal(after[0], after[1])


def test_without_a_compiler_training_goes_on_uncompiled(inputs, monkeypatch):
    torch._dynamo.reset()
    policy = build(blocks=2)
    before = velocities(policy, inputs)

    def broken(graph, inputs):
        raise RuntimeError("no compiler here\nand a long story")

    why = compile_blocks(policy, backend=broken)
    assert why and "\n" not in why
    assert all(block._compiled_call_impl is None for block in policy.model.blocks)
    assert all(torch.equal(a, b) for a, b in zip(before, velocities(policy, inputs), strict=True))


def test_a_trainer_says_that_it_compiles_and_why_not(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(trainer, "compile_blocks", lambda policy: "no compiler here")
    Trainer(quick(tmp_path / "run", "rollouts=1", "model.compile=true")).close()
    said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("model.compile: ")]
    assert len(said) == 2 and "a minute or two" in said[0] and said[1].endswith("going on without (no compiler here)")
