"""`flowtilt push`: what is uploaded, against a hub that is none."""

import re
import shutil
from html import escape
from pathlib import Path

import pytest
from huggingface_hub import ModelCard
from safetensors.torch import load_file

from flowtilt.cli import main
from flowtilt.config import load_recipe, to_toml
from flowtilt.runs.sharing import shared_recipe, shared_report


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
    for name in ("README.md", "recipe.toml", "report.html"):
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


def test_what_is_shared_names_no_server_and_no_folder(tmp_path):
    (tmp_path / "mine.py").write_text("def light(images, prompts):\n    return images.mean((1, 2, 3))\n")
    run = tmp_path / "run"
    run.mkdir()
    recipe = load_recipe(
        "playground",
        [
            f"rewards.mine={tmp_path}/mine.py:light",
            "rewards.geneval=http://inner.example:8765/geneval",
            'rewards.eye={source="judge",url="http://inner.example:8000/v1",model="m"}',
            'rewards.far={source="http://inner.example:1",weight=0.5}',
            f"run={run}",
        ],
    )
    (run / "recipe.toml").write_text(to_toml(recipe))
    (run / "report.html").write_text(f"<pre>{escape(to_toml(recipe))}</pre>")
    for text in (shared_recipe(run), shared_report(run)):
        assert "inner.example" not in text and str(tmp_path) not in text and "mine.py:light" in text
    (tmp_path / "shared.toml").write_text(shared_recipe(run))
    found = load_recipe(tmp_path / "shared.toml", stored=True).rewards
    assert found["geneval"] == "http://server/geneval" and found["far"].weight == 0.5 and found["eye"].options == {"model": "m"}
