"""The page on model families: its adapter, as it stands, draws, trains, and gives a LoRA that plain diffusers draws with."""

import re
import shlex
from pathlib import Path

import pytest
import torch
from conftest import QUICK
from diffusers import AuraFlowPipeline
from test_docs import ROOT, blocks
from tiny_pipelines import aura_flow

from flowtilt import UserError
from flowtilt.cli import main
from flowtilt.config import ModelSettings
from flowtilt.conformance import IMAGE
from flowtilt.io.files import read_lines
from flowtilt.lora.read import read_lora
from flowtilt.models.opening import open_model
from flowtilt.policy.tuned_model import TunedModel
from flowtilt.sampling.sampler import Sampler, decode

PAGE = ROOT / "docs" / "guides" / "add-a-model.md"


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A folder with the page's files, the pipeline, and what the page's command names."""
    monkeypatch.chdir(tmp_path)
    aura_flow(tmp_path / "auraflow")
    for code in blocks(PAGE, "python"):
        name = re.match(r"# (\S+)", code)
        assert name
        Path(name[1]).write_text(code)
    Path("my_reward.py").write_text(blocks(ROOT / "docs" / "guides" / "add-a-reward.md", "python")[0])
    Path("prompts.txt").write_text("\n".join(f"a picture of a {thing}" for thing in ("cat", "dog", "fox", "owl", "bee", "ant")))
    return tmp_path


def opened(**settings):
    return open_model(ModelSettings(path="auraflow", adapter="auraflow.py:AuraFlow", **settings), torch.device("cpu"))


def test_the_pages_check_finds_no_difference(place, capsys):
    assert main(shlex.split(blocks(PAGE, "bash")[0])[1:]) == 0
    said = capsys.readouterr().out.splitlines()
    assert len(said) == 12 and all(line.startswith("ok ") for line in said)


def test_a_mistake_is_found_and_named(place, capsys):
    text = Path("auraflow.py").read_text()
    Path("auraflow.py").write_text(text + "\n    negated = True\n    lora_targets = ('ff_context.linear_1',)\n")
    command = shlex.split(blocks(PAGE, "bash")[0])[1:]
    assert main(command) == 2
    wrong = [line for line in capsys.readouterr().out.splitlines() if line.startswith("WRONG")]
    assert any("image of 16 px, 3 steps, no guidance" in line and "greatest difference" in line for line in wrong)
    assert any("blocks have none, single_transformer_blocks.0 first" in line for line in wrong)
    assert main([*command, "--steps", "3"]) == 2 and "two different whole numbers" in capsys.readouterr().err


def test_the_pages_command_trains_and_plain_diffusers_draws_the_result(place, monkeypatch):
    words = shlex.split(blocks(PAGE, "bash")[1])[1:]
    assert main([*words, *QUICK, "rollouts=2", "lora.rank=4", "optimizer.lr=0.1", "ema=0", "model.resolution=16", "run=run"]) == 0
    records = read_lines(Path("run/metrics.jsonl"))
    assert len(records) == 2 and records[1]["deviation"] > 0

    model = opened()
    captions, noise = ["a cat", "two dogs"], torch.randn(2, *model.latent_shape)

    def ours(role):
        stack = TunedModel(model, [read_lora("run")])
        return decode(stack, Sampler("euler", 3)(stack, role, noise, model.encode(captions), 2), 2)

    pipeline = AuraFlowPipeline.from_pretrained("auraflow")
    pipeline.load_lora_weights("run/lora")
    pipeline.set_progress_bar_config(disable=True)
    theirs = pipeline(captions, sigmas=[1, 2 / 3, 1 / 3], latents=noise, output_type="pt", **model.call_options(1.0)).images
    torch.testing.assert_close(ours("tuned"), theirs, atol=IMAGE, rtol=0)
    assert (ours("tuned") - ours("base")).abs().max() > 1e-3

    Path("elsewhere").mkdir()
    monkeypatch.chdir("elsewhere")  # the pipeline's path is the user's own, the adapter's is kept whole
    words = ["--model", "../auraflow", "--lora", "../run"]
    assert main(["sample", "a cat", *words, "-o", "sample.png"]) == 0
    assert main(["evaluate", *words, "--prompts", "../prompts.txt", "--images", "6", "-o", "evaluation"]) == 0


def test_what_an_adapter_lacks_is_told_in_one_line(place):
    with pytest.raises(UserError, match=r"model: AuraFlow can't be built .*'guidance'"):
        opened(options={"guidance": 2.0})
    with pytest.raises(UserError, match="beyond the 32"):
        opened(resolution=36)
    Path("auraflow.py").write_text(Path("auraflow.py").read_text() + "\n    def shape_of_latents(self):\n        return self.shape\n")
    with pytest.raises(
        UserError, match=r"model\.adapter: building auraflow\.py:AuraFlow failed: AttributeError: .*'shape'.* at auraflow\.py:\d"
    ):
        opened()
    Path("auraflow.py").write_text("class AuraFlow:\n    def __init__(self, pipeline, *, offload):\n        self.resolution = 16\n")
    with pytest.raises(UserError, match=r"model\.adapter: auraflow\.py:AuraFlow has no .*levels.*, decode"):
        opened()
    Path("auraflow.py").unlink()
    with pytest.raises(UserError, match=r"model\.adapter: no file auraflow\.py"):
        opened()
