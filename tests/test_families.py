"""Every model family passes its conformance checks on a small random pipeline of the true classes."""

import pytest
import tiny_pipelines
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from small_families import SMALL, opened

from flowtilt import Trainer, UserError
from flowtilt.config import ModelSettings
from flowtilt.conformance import Conformance
from flowtilt.io.files import read_lines
from flowtilt.lora import Lora
from flowtilt.models.captions import Captions
from flowtilt.models.levels import levels_of
from flowtilt.models.opening import adapted, open_model
from flowtilt.models.z_image import ZImage
from flowtilt.policy.tuned_model import TunedModel

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    made = {}

    def folder(name):
        if name not in made:
            made[name] = getattr(tiny_pipelines, name)(tmp_path_factory.mktemp(name))
        return str(made[name])

    return folder


@pytest.mark.parametrize("name", SMALL)
def test_a_family_conforms(name, tmp_path):
    with opened(name, tmp_path) as (settings, sizes):
        wrong = [str(check) for check in Conformance(settings, CPU, sizes).checks() if not check.right]
    assert not wrong, "\n".join(wrong)


def test_levels_are_the_schedulers_with_the_pipelines_own_mu():
    for steps, terminal, mu in ((2, 0.02, 0.7), (8, None, 1.9), (28, 0.02, 0.5)):
        scheduler = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, shift_terminal=terminal)
        scheduler.set_timesteps(sigmas=[1 - k / steps for k in range(steps)], mu=mu)
        levels = levels_of(scheduler.config, lambda steps, mu=mu: mu)
        torch.testing.assert_close(levels(steps), scheduler.sigmas, atol=1e-6, rtol=0)
        times = levels.at(torch.linspace(0.02, 1, 50), steps)
        assert times[-1] == 1 and (times.diff() > 0).all() and times[0] > (terminal or 0)
    with pytest.raises(UserError, match="at least 2 steps, not 1"):
        levels_of(FlowMatchEulerDiscreteScheduler(shift_terminal=0.02).config, lambda steps: 1.0)(1)
    with pytest.raises(UserError, match="use_karras_sigmas"):
        levels_of(FlowMatchEulerDiscreteScheduler(use_karras_sigmas=True).config, lambda steps: 1.0)


def test_what_a_family_cannot_have_is_one_line(folders):
    folder = folders("z_image")
    for settings, said in (
        ({"resolution": 18}, "model.resolution: 18 is not a multiple of 4"),
        ({"resolution": 512}, "model.resolution: 512 is beyond the 256"),
        ({"t5_length": 20}, "ZImage can't be built .*'t5_length'"),
    ):
        with pytest.raises(UserError, match=said):
            open_model(ModelSettings(path=folder, **settings), CPU)
    model = open_model(ModelSettings(path=folder, resolution=16), CPU)
    lora = Lora({"transformer_blocks.0.attn.to_q": (torch.ones(1, 8), torch.ones(8, 1))}, {"transformer_blocks.0.attn.to_q": 1.0}, "flux")
    with pytest.raises(UserError, match="it belongs to another base"):
        TunedModel(model, [lora])
    pipeline = model.pipeline
    pipeline.text_encoder = None
    with pytest.raises(UserError, match="this ZImagePipeline has no text_encoder"):
        ZImage(pipeline)


def test_a_pipeline_without_a_family_or_without_loras_is_one_line():
    class Other:
        pass

    with pytest.raises(UserError, match=r"a Other, for which flowtilt has no family; subclass flowtilt\.models\.family\.Family"):
        adapted(ModelSettings(path="x"), Other(), False)
    Other.__name__ = "ChromaPipeline"
    with pytest.raises(UserError, match="diffusers' ChromaPipeline has no save_lora_weights; give Chroma a save_lora of its own"):
        adapted(ModelSettings(path="x"), Other(), False)


def test_captions_of_unlike_length_are_padded_joined_and_cut_to_the_rows_that_are_asked_for():
    captions = Captions(lambda text: {"e": torch.ones(len(text), 2)}, [], CPU, ragged=True)
    both = captions(["ab", "abcde"]).join(captions(["abc"]))
    assert both.tokens() == [2, 5, 3] and both.tensors()["e"].sum((1, 2)).tolist() == [4, 10, 6]
    short = both.select(torch.tensor([0, 2]))
    mask = short.mask(CPU)
    assert short.tensors()["e"].shape == (2, 3, 2) and mask is not None and mask.tolist() == [[True, True, False], [True] * 3]
    assert both.select(torch.tensor([1])).mask(CPU) is None


@pytest.mark.parametrize("name", ["qwen_image", "z_image", "flux2_klein"])
def test_a_family_trains_with_and_without_guidance(folders, name, tmp_path):
    (tmp_path / "p.txt").write_text("a cat\ntwo dogs on a hill\n")
    recipe = {
        "name": "x",
        "model": {"path": folders(name), "resolution": 16, **SMALL[name].settings},
        "prompts": str(tmp_path / "p.txt"),
        "rewards": {"red": 1.0},
        "rollout": {"prompts": 2, "images_per_prompt": 2, "steps": 2, "guidance": 2.0},
        "objective": {"type": "nft", "times_per_image": 2, "kl": 0.1, "reference_guidance": 2.0, "guide": 1.0, "guide_share": 1.0},
        "lora": {"rank": 2, "alpha": 4.0},
        "evaluate": {"every": 0, "images": 1, "steps": 2, "samples": 0},
        "steps": 1,
    }
    trainer = Trainer(recipe, rewards={"red": lambda images, prompts: images[:, 0].mean((1, 2))}, run=str(tmp_path / "run"))
    trainer.run()
    line = read_lines(tmp_path / "run" / "metrics.jsonl")[0]
    assert line["grad_norm"] > 0 and line["kl"] > 0 and line["guide"] > 0
    plan = trainer.recipe.objective.passes(trainer.recipe, 1)
    assert line["network_evaluations"] == pytest.approx(plan.evaluations, abs=8)  # the guide's rows are known by their noise levels only
