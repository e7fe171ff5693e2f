"""The card of an exported LoRA: its code works, and a hub reads what it says."""

import json
import re
import tomllib
from pathlib import Path

import pytest
from huggingface_hub import ModelCard
from test_lora import same

from flowtilt import load_recipe
from flowtilt.lora.read import read_lora
from flowtilt.runs import card
from flowtilt.runs.export import export

# from a run ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("to", ["diffusers", "peft"])
def test_a_runs_export_has_a_card_whose_snippet_works(learnt, tmp_path, to):
    line = export([learnt], tmp_path / "out", to)
    assert str(tmp_path / "out") in line and "\n" not in line
    text = (tmp_path / "out" / "README.md").read_text()
    assert "rank 32 (alpha 32)" in text and "score:" in text and str(learnt) not in text and "`recipe.toml` in this folder" in text
    assert (tmp_path / "out" / "recipe.toml").read_bytes() == (learnt / "recipe.toml").read_bytes()
    scope = {}
    exec(text.split("```python\n")[1].split("```")[0], scope)
    assert scope["image"].size == (32, 32)
    same(read_lora(learnt), read_lora(tmp_path / "out"))
    assert scope["pipe"].transformer.peft_config


def metadata(card):
    """What a hub reads of a card."""
    return ModelCard(card).data.to_dict()


@pytest.mark.parametrize("to", ["diffusers", "peft"])
def test_a_hub_reads_what_the_card_says(learnt, tmp_path, to):
    export([learnt], tmp_path / "out", to)
    found = metadata((tmp_path / "out" / "README.md").read_text())
    assert found == {
        "library_name": to,
        "license": "apache-2.0",
        "pipeline_tag": "text-to-image",
        "tags": ["text-to-image", "lora", "flowtilt", "nft"],
    }
    assert metadata((learnt / "lora" / "README.md").read_text()) == found | {"library_name": "diffusers"}


@pytest.mark.parametrize("path", ["a: b", "#1/x", "- x", "'", "C:\\models\\sd3", '"q"', "/models/of me", "{x}", "models"])
def test_a_base_in_a_folder_of_any_name_is_no_hub_id_and_spoils_nothing(path):
    recipe = load_recipe("playground", [f"model.path={json.dumps(path)}"])
    found = metadata(card.metadata(recipe, "peft") + "# text\n")
    assert "base_model" not in found and "license" not in found and found["library_name"] == "peft"


def test_a_base_on_the_hub_is_named_with_its_licence(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    found = metadata(card.metadata(load_recipe("sd35m", ["rewards.mine=jpeg_compressibility"])) + "# text\n")
    assert found["base_model"] == "stabilityai/stable-diffusion-3.5-medium" and found["base_model_relation"] == "adapter"
    assert (found["license"], found["license_name"]) == ("other", "stabilityai-ai-community")
    recipe = load_recipe("playground", ["model.path=some/model"])
    assert metadata(card.metadata(recipe) + "# text\n")["base_model"] == "some/model"
    (tmp_path / "some" / "model").mkdir(parents=True)
    assert "base_model" not in metadata(card.metadata(recipe) + "# text\n")


def test_every_base_of_a_recipe_and_of_the_page_of_models_has_its_licence():
    root = Path(__file__).parents[1]
    page = (root / "docs" / "reference" / "models.md").read_text()
    named = set(re.findall(r"`([\w-]+/[\w.-]+)`", page)) - {"Qwen/Qwen-Image-2.1"}  # whose licence the page does not say
    recipes = {tomllib.loads(file.read_text()).get("model", {}).get("path") for file in (root / "src/flowtilt/recipes").glob("*.toml")}
    assert len(named) > 9 and named | recipes - {None} <= set(card.LICENSES)
    for base in card.LICENSES:
        found = metadata(card.metadata(load_recipe("playground", [f"model.path={base}"])) + "# text\n")
        assert found["license"] == "apache-2.0" or found["license_link"].startswith(f"https://huggingface.co/{base}")
