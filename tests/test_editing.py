"""Editing: prompts with source images, from the file to the report; FLUX.1-Kontext and Qwen-Image-Edit at tiny size."""

import json

import pytest
import tiny_pipelines
import torch
from diffusers.pipelines.qwenimage import pipeline_qwenimage_edit_plus
from PIL import Image
from safetensors.torch import load_file
from small_families import opened

from flowtilt import Trainer, UserError
from flowtilt.cli import main
from flowtilt.config import ModelSettings
from flowtilt.evaluate.assess import assess
from flowtilt.io.files import read_lines
from flowtilt.io.images import read_square
from flowtilt.models.captions import SOURCE
from flowtilt.models.editing import check_sources
from flowtilt.models.kontext import Kontext
from flowtilt.models.opening import open_model
from flowtilt.prompts import Prompt, load_prompts
from flowtilt.rewards import load_reward, score
from flowtilt.runs.folder import open_run

CPU = torch.device("cpu")
KONTEXT = {"t5_length": 40, "options": {"source_resolution": 12}}


@pytest.fixture(scope="module")
def kontext(tmp_path_factory):
    return str(tiny_pipelines.kontext(tmp_path_factory.mktemp("kontext")))


@pytest.fixture(scope="module")
def edits(tmp_path_factory):
    """A prompt file of three edits, one instruction of which comes twice."""
    folder = tmp_path_factory.mktemp("edits")
    (folder / "in").mkdir()
    for name, color in (("red", (200, 0, 0)), ("blue", (0, 0, 200))):
        Image.new("RGB", (40, 20), color).save(folder / "in" / f"{name}.png")
    rows = [("make it green", "red"), ("make it green", "blue"), ("a cat", "red"), ("a cat", "red")]
    (folder / "edits.jsonl").write_text("".join(json.dumps({"prompt": p, "image": f"in/{name}.png"}) + "\n" for p, name in rows))
    return folder / "edits.jsonl"


def stays(images, prompts, sources):
    return 1 - (images - sources).abs().mean((1, 2, 3))


def recipe(model, edits, kind="nft", **more):
    objective = {"type": "nft", "times_per_image": 2, "kl": 0.1, "reference_guidance": 2.0} if kind == "nft" else {"type": kind}
    return {
        "name": "x",
        "model": {"path": model, "resolution": 16, **KONTEXT},
        "prompts": str(edits),
        "rewards": {"stays": 1.0},
        "rollout": {"prompts": 2, "images_per_prompt": 2, "steps": 3, "guidance": 2.0},
        "objective": objective,
        "lora": {"rank": 2, "alpha": 4.0},
        "evaluate": {"every": 2, "images": 3, "steps": 2, "samples": 2, "rewards": ["stays"]},
        "checkpoint": {"every": 1, "keep": 3},
        "rollouts": 2,
        **more,
    }


# prompts ---------------------------------------------------------------------------------------------


def test_prompts_are_told_apart_by_their_source_and_keep_its_name(edits, tmp_path):
    prompts = load_prompts(edits)
    assert [(p.text, p.metadata["image"]) for p in prompts] == [
        ("make it green", "in/red.png"),
        ("make it green", "in/blue.png"),
        ("a cat", "in/red.png"),
    ]
    assert prompts[0].image == str(edits.parent / "in" / "red.png") and len({p.key for p in prompts}) == 3
    (tmp_path / "p.tsv").write_text(f"prompt\timage\nmake it green\t{edits.parent}/in/red.png\n")
    assert load_prompts(tmp_path / "p.tsv")[0].image == prompts[0].image
    (tmp_path / "q.jsonl").write_text('{"prompt": "a", "image": "x.png"}\n{"prompt": "b", "image": 3}\n')
    with pytest.raises(UserError, match=r'q\.jsonl:2: "image" must be the name of an image file, not 3'):
        load_prompts(tmp_path / "q.jsonl")


def test_a_source_is_the_middle_square(tmp_path):
    picture = Image.new("RGB", (30, 10), (255, 0, 0))
    picture.paste((0, 255, 0), (10, 0, 20, 10))
    picture.save(tmp_path / "x.png")
    assert torch.equal(read_square(str(tmp_path / "x.png"), 5), torch.tensor([0.0, 1, 0])[:, None, None].expand(3, 5, 5))


def test_what_is_missing_or_too_much_is_one_line(kontext, edits, tmp_path):
    model = open_model(ModelSettings(path=kontext, resolution=16, **KONTEXT), CPU)
    (tmp_path / "text.png").write_text("no image")
    for prompt, said in (
        (Prompt("a", where="e.jsonl:2"), r"prompts e\.jsonl:2: no source image, and a FluxKontextPipeline edits one; name it in a column"),
        (Prompt("a", where="e.jsonl:3", image=f"{tmp_path}/gone.png"), r"prompts e\.jsonl:3: source image .*gone\.png: no such file"),
        (Prompt("a", where="e.jsonl:4", image=f"{tmp_path}/text.png"), r"e\.jsonl:4: source image .*text\.png: not an image that can be"),
    ):
        with pytest.raises(UserError, match=said) as caught:
            check_sources(model, [*load_prompts(edits), prompt])
        assert "\n" not in str(caught.value)
    with pytest.raises(UserError, match='"a cat" has no source image'):
        model.encode(["a cat"])
    plain = open_model(ModelSettings(path="playground"), CPU)
    with pytest.raises(
        UserError, match=r"edits\.jsonl:1: names a source image, but a StableDiffusion3Pipeline takes none; remove or rename"
    ):
        check_sources(plain, load_prompts(edits))
    with pytest.raises(UserError, match=r"model\.options\.source_resolution: 13 is not a multiple of 4"):
        open_model(ModelSettings(path=kontext, options={"source_resolution": 13}), CPU)
    cut = tmp_path / "cut.png"
    cut.write_bytes((edits.parent / "in" / "red.png").read_bytes()[:50])
    with pytest.raises(UserError, match=r"prompts p:7: source image .*cut\.png"):
        model.encode([Prompt("a", where="p:7", image=str(cut)).caption])
    model.pipeline.text_encoder = None
    with pytest.raises(UserError, match="this FluxKontextPipeline has no text_encoder, which reads captions"):
        Kontext(model.pipeline)


# rewards ---------------------------------------------------------------------------------------------


def test_a_reward_sees_the_source_in_the_size_of_the_image(edits):
    prompts = load_prompts(edits)[:2]
    reward = load_reward("stays", stays)
    images = torch.stack([read_square(prompt.image, 8) for prompt in prompts])
    assert score({"stays": reward}, images, prompts)[0]["stays"].tolist() == [1, 1]
    assert score({"stays": reward}, images.flip(0), prompts)[0]["stays"].max() < 0.6
    with pytest.raises(UserError, match='reward stays: reads source images, but prompt "a cat" has none'):
        score({"stays": reward}, images[:1], [Prompt("a cat")])


# families --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["qwen_image_edit", "qwen_image_edit_plus"])
def test_a_larger_source_image_has_more_tokens_as_planned(name, edits, tmp_path, monkeypatch):
    def tokens(model):
        read, blank = model.encode([load_prompts(edits)[0].caption]), model.blank(8)
        assert read.sources.shape[1:] == blank[SOURCE].shape
        return read.tokens()[0], len(blank["encoder_hidden_states"])

    with opened(name, tmp_path) as (settings, _):
        few = tokens(open_model(settings, CPU))
        monkeypatch.setattr(pipeline_qwenimage_edit_plus, "CONDITION_IMAGE_SIZE", 32 * 32)
        larger = settings.model_copy(update={"options": {"source_resolution": 64}})
        more = tokens(open_model(larger, CPU))
    assert more[0] - few[0] == more[1] - few[1] != 0


# training --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["nft", "grpo"])
def test_an_edit_trains_and_goes_on_to_the_same_bits(kontext, edits, kind, tmp_path):
    shown = []
    whole = Trainer(
        recipe(kontext, edits, kind), rewards={"stays": stays}, run=str(tmp_path / "run"), on_rollout=lambda m, p: shown.append(p)
    )
    whole.run()
    lines = read_lines(tmp_path / "run" / "metrics.jsonl")
    assert all(line["grad_norm"] > 0 for line in lines)
    assert shown[0].sources.shape == shown[0].images.shape
    assert (tmp_path / "run" / "report.html").read_text().count("source image") == 2  # samples, with two edits
    Trainer(recipe(kontext, edits, kind, rollouts=1), rewards={"stays": stays}, run=str(tmp_path / "half")).run()
    Trainer(open_run(tmp_path / "half", ["rollouts=2"]), resume=tmp_path / "half", rewards={"stays": stays}).run()
    ours, theirs = (load_file(tmp_path / run / "checkpoints" / "step-000002" / "current.safetensors") for run in ("run", "half"))
    assert all(torch.equal(x, theirs[name]) for name, x in ours.items())
    if kind == "nft":
        card = (tmp_path / "run" / "lora" / "README.md").read_text()
        assert "pipeline_tag: image-to-image" in card and 'image=load_image("photo.png")' in card
        compile(card.split("```python")[1].split("```")[0], "card", "exec")
        (tmp_path / "mine.py").write_text("def stays(images, prompts, sources):\n    return 1 - (images - sources).abs().mean((1, 2, 3))\n")
        found = assess(
            tmp_path / "out", loras=[tmp_path / "run"], rewards=[f"{tmp_path}/mine.py:stays"], steps=2, trust=True, prompts=[str(edits)]
        )
        assert found and (tmp_path / "out" / "report.html").read_text().count(">source<") >= 3
        picture = tmp_path / "sheet.png"
        words = ["sample", "make it green", "--image", str(edits.parent / "in" / "red.png"), "--lora", str(tmp_path / "run")]
        assert main([*words, "--steps", "2", "-o", str(picture)]) == 0
        with Image.open(picture) as sheet:
            assert (200, 0, 0) in set(sheet.convert("RGB").getdata())  # the source
