"""The speed benchmark says what it measured, and measures two sides that compute the same."""

import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

sys.path.append(str(Path(__file__).parent.parent / "benchmarks"))

import clocks
import compiled
import models
import objectives
import plain
import step

TINY = ["--rounds", "1", "model.dtype=float32", "model.resolution=16", "rollout.prompts=2", "rollout.images_per_prompt=3"]
TINY += ["model.t5_length=8", "rollout.steps=2", "objective.times_per_image=2", "lora.rank=4"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A random pipeline of SD3.5-Medium's structure."""
    place = tmp_path_factory.mktemp("small")
    models.write("small", place)
    return place


@pytest.fixture
def bench(monkeypatch, tmp_path, folder):
    """The command, with results of its own."""
    monkeypatch.setenv("XDG_CACHE_HOME", "")  # put back afterwards: the command points it at a folder that is gone by then

    def run(*words):
        step.main(["--output", str(tmp_path / "step.json"), "--model", str(folder), "--name", "small", *words])
        return json.loads((tmp_path / "step.json").read_text())

    return run


def test_both_sides_do_the_same_step_and_each_run_replaces_its_own_figures(bench, tmp_path, capsys):
    (tmp_path / "step.json").write_text('[{"run": "small", "method": "plain 7"}, {"run": "other"}]')
    found = bench("--sizes", "4,6", *TINY)
    assert [(entry["run"], entry.get("method")) for entry in found] == [
        ("other", None),
        *(("small", method) for method in ("flowtilt", "plain 4", "plain 6")),
    ]
    ours = found[1]
    # every gradient's direction, Adam's first step being its sign
    assert 0 < ours["relative_weight_difference_after_one_step"] < 1e-2
    assert ours["needed_operations"]["train"] > ours["needed_operations"]["sample"] > 0
    for shares in (ours["phases"], ours["parts"]):
        assert sum(shares.values()) == pytest.approx(1) and all(share >= 0 for share in shares.values())
    assert ours["geometry"] == {"images": [2, 3], "solver": ["dpm2", 2], "times": 2, "resolution": 16}
    assert "peak n/a" in capsys.readouterr().out and ours["utilisation"] is None


def test_a_plain_loop_that_computes_something_else_is_found_out(bench, monkeypatch, tmp_path):
    monkeypatch.setattr(plain, "optimality", lambda advantages, clip: torch.full_like(advantages, 0.9))
    with pytest.raises(SystemExit, match="do not compute the same"):
        bench("--sizes", "6", *TINY)
    assert not (tmp_path / "step.json").exists()


def test_a_size_that_does_not_fit_is_named_and_not_tried_again(bench, monkeypatch, capsys):
    whole = plain.PlainLoop.step
    tried = []

    def small_card(self, number, size, same_noise=False):
        tried.append(size)
        if size > 4:
            raise torch.OutOfMemoryError
        whole(self, number, size, same_noise)

    monkeypatch.setattr(plain.PlainLoop, "step", small_card)
    found = bench("--sizes", "4,6", *TINY)
    assert tried == [4, 6, 4] and found[2]["seconds"] is None and found[1]["ratio"] > 0
    assert "plain 6      out of memory" in capsys.readouterr().out


def test_methods_differ_in_nothing_but_the_method(monkeypatch, tmp_path, folder, capsys):
    output, recipes = tmp_path / "objectives.json", "sd35m-geneval,sd35m-grpo-fast"
    begun = []
    monkeypatch.setattr(objectives, "begin_memory", lambda device: begun.append(device))
    small = ["model.dtype=float32", "model.resolution=16", "model.t5_length=8", "lora.rank=4"]
    objectives.main(["--model", str(folder), "--output", str(output), "--images", "2", "--recipes", recipes, *small])
    nft, grpo = json.loads(output.read_text())
    # 10 to draw, then 9 times forward, backward, old and reference; FlowGRPO-Fast 3 steps forward and backward
    assert (nft["evaluations_per_image"], grpo["evaluations_per_image"]) == (10 + 9 * (3 + 1 + 1), 10 + 3 * 3)
    assert len(begun) == 2 and nft["utilisation"] is None and nft["peak_gib"] is None
    assert "(1.00 x NFT)" in capsys.readouterr().out


def test_a_compiled_network_is_held_against_itself_as_it_was(monkeypatch, tmp_path, folder):
    """Here the compiler makes all velocities larger, and those that are recorded larger still."""

    def compiler(policy):
        forward = policy.forward
        policy.forward = lambda *given: forward(*given) * (1.03 if torch.is_grad_enabled() else 1.01)
        return ""

    monkeypatch.setattr(compiled, "compile_blocks", compiler)
    output, words = (
        tmp_path / "compiled.json",
        [word for word in TINY[2:] if not word.startswith(("rollout.prompts", "rollout.images", "rollout.steps"))],
    )
    compiled.main(["--model", str(folder), "--output", str(output), "--rows", "3", "rollout.steps=5", *words])
    found = json.loads(output.read_text())
    before, after = found["plain"]["velocities"], found["compiled"]["velocities"]
    assert max(before["recorded"], before["reference"], *before["ratio_off"].values()) < 1e-6  # fp32
    assert after["not_compiled"] == pytest.approx(0.01, rel=1e-3) and after["recorded"] == pytest.approx(0.02 / 1.01, rel=1e-3)
    assert after["reference"] < 1e-6 and all(value > 1e-5 for value in after["ratio_off"].values())
    assert found["compiled"]["rollout_seconds"] > 0 and found["plain"]["forward_kernels_ms"] is None


def test_utilisation_is_told_for_gpus_whose_figures_are_known_alone():
    h100 = 989.4e12
    names = {"NVIDIA H100 80GB HBM3": h100, "NVIDIA H200": h100, "NVIDIA A100-SXM4-80GB": 312e12, "NVIDIA GeForce RTX 4090": 165.2e12}
    assert {name: clocks.rate_of(name) for name in names} == names
    for other in ("NVIDIA H100 PCIe", "NVIDIA H200 NVL", "NVIDIA GeForce RTX 4090 Laptop GPU", "Tesla V100-SXM2-16GB"):
        assert clocks.rate_of(other) is None


def test_a_card_is_stood_for_by_what_it_leaves_beside_the_cuda_context(monkeypatch):
    shares = []
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: SimpleNamespace(total_memory=141e9))
    monkeypatch.setattr(torch.cuda, "set_per_process_memory_fraction", shares.append)
    clocks.cap_memory(24)
    clocks.cap_memory(1000)
    assert shares == [pytest.approx(23.5 * 2**30 / 141e9), 1.0]
