"""A quantised base: its velocity is near the whole one's, a LoRA on it trains in fp32, resumes and is exported as any other."""

import pytest
import torch
from conftest import quick
from reading import from_pretrained
from safetensors.torch import load_file
from torch import nn

from flowtilt import Trainer, UserError, load_recipe
from flowtilt.config import ModelSettings
from flowtilt.evaluate.side_by_side import sample
from flowtilt.io.files import read_lines
from flowtilt.models import quantized
from flowtilt.models.opening import open_model
from flowtilt.policy.lora import LoraPolicy
from flowtilt.runs.export import export
from flowtilt.runs.folder import open_run

CPU = torch.device("cpu")


def test_what_it_does_not_go_with_is_one_line():
    for more, said in (("train=full", 'train = "full" trains the weights'), ("shard=base", 'shard = "base" spreads')):
        with pytest.raises(UserError, match=f"model.quantize: {said}"):
            load_recipe("playground", ["model.quantize=int8", "micro_batch=4", more])


def test_a_device_that_can_not_is_one_line(monkeypatch):
    def fails(layer, kind):
        raise RuntimeError("no kernel for this device\nand more")

    monkeypatch.setattr(quantized, "_quantize", fails)
    with pytest.raises(UserError, match=r"model\.quantize: 'nf4' can't be used on cpu here: no kernel for this device; leave it out"):
        open_model(ModelSettings(path="playground", quantize="nf4"), CPU)


def test_without_torchao_it_says_what_to_install(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "torchao.quantization", None)
    with pytest.raises(UserError, match=r"pip install 'flowtilt\[quantize\]'"):
        open_model(ModelSettings(path="playground", quantize="int8"), CPU)


def test_bytes_per_weight_are_those_of_the_tensors():
    pytest.importorskip("torchao")
    for kind, bytes_per_weight in quantized.BYTES.items():
        layer = nn.Linear(1024, 512, bias=False)
        before = layer.weight.detach().clone()
        quantized._quantize(layer, kind)
        parts = [getattr(layer.weight, name) for name in layer.weight.__tensor_flatten__()[0]]
        assert sum(x.nbytes for x in parts if isinstance(x, torch.Tensor)) / before.numel() == pytest.approx(bytes_per_weight, rel=0.02)
        x = torch.randn(4, 1024)
        torch.testing.assert_close(layer(x), x @ before.T, atol=0.25 if kind == "nf4" else 0.03, rtol=0)


@pytest.mark.parametrize("kind", ["int8", "nf4"])
def test_a_policy_on_it_is_near_the_whole_one_and_has_an_exact_gradient(kind):
    pytest.importorskip("torchao")
    whole, small = (open_model(ModelSettings(path="playground", dtype="float32", quantize=q), CPU) for q in (None, kind))
    x, t = torch.randn(2, *whole.latent_shape), torch.tensor([0.3, 0.8])
    given = whole.encode(["a red circle", "two crosses"])
    with torch.no_grad():
        exact, near = (model.velocity(x, t, given) for model in (whole, small))
    assert 0 < (near - exact).abs().max() < (0.05 if kind == "int8" else 0.5) * exact.abs().max()
    policy = LoraPolicy(small, rank=4, alpha=4.0, seed=0)
    assert not policy.merge and all(weight.dtype == torch.float32 for weight in policy.parameters)
    policy.velocity("current", x, t, given).square().mean().backward()
    grads = [weight.grad for weight in policy.parameters]
    assert all(g is not None and g.isfinite().all() for g in grads) and any(g.any() for g in grads)
    with torch.no_grad():
        assert torch.equal(policy.velocity("reference", x, t, given), near) and torch.equal(policy.velocity("old", x, t, given), near)


def test_a_run_resumes_to_the_bit_and_its_lora_is_that_of_any_base(tmp_path):
    pytest.importorskip("torchao")
    small = ["model.quantize=int8", "model.dtype=float32", "evaluate.every=0"]
    Trainer(quick(tmp_path / "whole", *small)).run()
    Trainer(quick(tmp_path / "half", *small, "rollouts=1")).run()
    Trainer(open_run(tmp_path / "half", ["rollouts=2"]), resume=tmp_path / "half").run()
    ours, theirs = (load_file(tmp_path / run / "checkpoints" / "step-000002" / "current.safetensors") for run in ("whole", "half"))
    assert all(torch.equal(x, theirs[name]) for name, x in ours.items())
    assert read_lines(tmp_path / "whole" / "metrics.jsonl")[-1]["deviation"] > 0
    assert sample(["a red circle"], tmp_path / "x.png", loras=[tmp_path / "whole"], steps=2).stat().st_size
    export([tmp_path / "whole"], tmp_path / "merged", "pipeline")  # into the weights of the pipeline's files, which are whole
    assert all(x.dtype.is_floating_point for x in from_pretrained(tmp_path / "merged").transformer.state_dict().values())
