"""`flowtilt push`: what is uploaded, against a hub that is none."""

import re
import shutil
from pathlib import Path

import pytest
from huggingface_hub import ModelCard
from safetensors.torch import load_file

from flowtilt.cli import main
from flowtilt.config import load_recipe


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """Repositories by name, with their files and whether they are private."""
    made = {}

    class Hub:
        def create_repo(self, repo_id, private, exist_ok, repo_type):
            assert exist_ok and repo_type == "model"
            made[repo_id] = private
            return f"https://hub/{repo_id}"

        def upload_folder(self, repo_id, folder_path, commit_message):
            shutil.copytree(folder_path, tmp_path / "hub" / repo_id)

    monkeypatch.setattr("huggingface_hub.HfApi", Hub)
    return made


def test_a_runs_lora_card_recipe_and_report_are_uploaded(finished, hub, tmp_path, capsys):
    assert main(["push", str(finished), "alice/circles", "--private"]) == 0
    assert capsys.readouterr().out == "https://hub/alice/circles\n" and hub == {"alice/circles": True}
    there = tmp_path / "hub" / "alice" / "circles"
    assert {file.name for file in there.iterdir()} >= {"pytorch_lora_weights.safetensors", "README.md", "recipe.toml", "report.html"}
    ours, theirs = (load_file(folder / "pytorch_lora_weights.safetensors") for folder in (finished / "lora", there))
    assert ours.keys() == theirs.keys()
    card = ModelCard.load(there / "README.md")
    assert card.data.library_name == "diffusers" and 'load_lora_weights("alice/circles")' in card.text
    recipe, own = load_recipe(there / "recipe.toml", stored=True), load_recipe(finished / "recipe.toml", stored=True)
    assert recipe.run is None and recipe.objective == own.objective and recipe.rollout == own.rollout
    for name in ("README.md", "recipe.toml"):
        text = (there / name).read_text()
        assert str(finished.parent) not in text and str(Path(__file__).parent) not in text
        assert not re.search(r'"/\w+/', text), name


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["RUN", "circles"], "'circles' is no name of a repository; give OWNER/NAME"),
        (["RUN", "a/b/c"], "no name of a repository"),
        (["nowhere", "alice/circles"], "not a run"),
    ],
)
def test_what_can_not_be_uploaded_is_one_line(words, said, finished, hub, capsys):
    assert main(["push", *(str(finished) if word == "RUN" else word for word in words)]) == 2
    assert said in capsys.readouterr().err and not hub


def test_a_hub_that_refuses_is_one_line(finished, monkeypatch, capsys):
    class Hub:
        def create_repo(self, *args, **options):
            raise OSError("401 Client Error\nmore")

    monkeypatch.setattr("huggingface_hub.HfApi", Hub)
    assert main(["push", str(finished), "alice/circles"]) == 2
    assert "push alice/circles: 401 Client Error; `hf auth login` logs in" in capsys.readouterr().err


def test_a_run_without_a_lora_is_refused(finished, hub, tmp_path, capsys):
    (tmp_path / "run").mkdir()
    shutil.copy(finished / "recipe.toml", tmp_path / "run")
    assert main(["push", str(tmp_path / "run"), "alice/circles"]) == 2
    assert "has no LoRA yet" in capsys.readouterr().err and not hub
