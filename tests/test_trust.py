"""A recipe that is found with a LoRA, or in a run's folder from elsewhere, runs no code and contacts no server without --trust."""

import shutil

import pytest
from conftest import QUICK, quick, two_blocks
from test_lora import random_lora

from flowtilt import UserError
from flowtilt.cli import main
from flowtilt.config import load_recipe, to_toml, trust
from flowtilt.evaluate.assess import assess
from flowtilt.evaluate.side_by_side import sample
from flowtilt.io.files import write_json
from flowtilt.lora.write import to_diffusers
from flowtilt.playground import pipeline_path
from flowtilt.runs import folder as runs
from flowtilt.runs.export import export

EVIL = """
from pathlib import Path
Path(__file__).with_name("ran").write_text("")
from flowtilt.models.sd3 import SD3
def score(images, prompts):
    return images.mean((1, 2, 3))
"""
SERVER = "http://attacker.invalid:1"


@pytest.fixture
def downloaded(tmp_path):
    """A folder as it may come from anywhere: a LoRA, code, and a recipe that `recipe` writes."""
    folder = tmp_path / "dl"
    to_diffusers(random_lora({"transformer_blocks.0.attn.to_q": (128, 128)}), folder / "a" / "b" / "lora")
    (folder / "evil.py").write_text(EVIL)
    return folder


def recipe(downloaded, *overrides, at="."):
    found = quick(downloaded, *overrides, whole=True)
    (downloaded / at / "recipe.toml").write_text(to_toml(found))
    return downloaded / at / "recipe.toml"


def ran(downloaded):
    return (downloaded / "ran").exists()


def refused(call, *said):
    with pytest.raises(UserError) as caught:
        call()
    assert "--trust" in str(caught.value) and "\n" not in str(caught.value)
    assert all(word in str(caught.value) for word in said)


def drawn(place, tmp_path, **options):
    return sample(["a red circle"], tmp_path / "x.png", loras=[place], steps=1, base_too=False, **options)


def evaluated(place, tmp_path, **options):
    return assess(tmp_path / "out", loras=[place], images=2, steps=1, **options)


@pytest.mark.parametrize("at", ["a/b/lora", "a/b", "a"])
@pytest.mark.parametrize("place", ["a/b/lora", "a/b/lora/pytorch_lora_weights.safetensors"])
def test_an_adapter_of_a_found_recipe_is_not_run(downloaded, tmp_path, at, place):
    """Wherever it is found: beside the LoRA, in the folder above, or, for a checkpoint, in its run."""
    recipe(downloaded, f"model.adapter={downloaded}/evil.py:SD3", at=at)
    if at == "a":
        write_json(downloaded / "a" / "b" / "lora" / "state.json", {"state": {"parents": []}})
    place = downloaded / place
    for call in (drawn, evaluated):
        refused(lambda call=call: call(place, tmp_path), "model.adapter", "evil.py:SD3", "recipe.toml")
        # the user's own model changes nothing: the recipe's adapter would open it
        refused(lambda call=call: call(place, tmp_path, model=str(pipeline_path())), "model.adapter")
    assert not ran(downloaded)
    drawn(place, tmp_path, trust=True)
    assert ran(downloaded)


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["rewards.x=HERE/evil.py:score", 'evaluate.rewards=["x"]'], "rewards.x is"),
        (["rewards.x=HERE/evil.py:score", "evaluate.rewards=[]"], "rewards.x is"),
        (['rewards.x={source="HERE/evil.py:score"}', 'evaluate.rewards=["x"]'], "rewards.x is"),
        (['evaluate.rewards=["HERE/evil.py:score"]'], None),  # a slash parts a reward from its detail
        (['evaluate.rewards=["evil.py:score"]'], "evil.py:score"),
        ([f'rewards.x="{SERVER}"', 'evaluate.rewards=["x"]'], SERVER),
        ([f'rewards.x={{source="unifiedreward",options={{server="{SERVER}"}}}}', 'evaluate.rewards=["x"]'], SERVER),
    ],
)
@pytest.mark.parametrize("compat", [False, True])
def test_rewards_of_a_found_recipe_are_neither_run_nor_contacted(downloaded, tmp_path, monkeypatch, overrides, said, compat):
    monkeypatch.chdir(downloaded)
    monkeypatch.setenv("FLOWTILT_REWARD_KEY", "secret")
    monkeypatch.setattr("urllib.request.OpenerDirector.open", lambda *args, **options: pytest.fail("contacted a server"))
    monkeypatch.setattr("http.client.HTTPConnection.connect", lambda self: pytest.fail("contacted a server"))
    recipe(downloaded, *(one.replace("HERE", str(downloaded)) for one in overrides), at="a/b")
    place = downloaded / "a" / "b" / "lora"
    if said:
        refused(lambda: evaluated(place, tmp_path, compat=compat), said)
    else:
        with pytest.raises(UserError):
            evaluated(place, tmp_path, compat=compat)
    assert not ran(downloaded)


def test_what_is_not_used_needs_no_flag(downloaded, tmp_path):
    """Sampling judges nothing, and the user's own rewards take the place of the recipe's."""
    recipe(downloaded, f"rewards.x={downloaded}/evil.py:score", 'evaluate.rewards=["x"]', at="a/b")
    place = downloaded / "a" / "b" / "lora"
    drawn(place, tmp_path)
    evaluated(place, tmp_path, rewards=["jpeg_compressibility"])
    assert not ran(downloaded)


def test_a_kernel_that_diffusers_would_download_is_code_too():
    parts = trust.of_model(load_recipe("playground", ["model.attention=flash_hub"]).model)
    assert parts == {"model.attention": "flash_hub"}
    assert not trust.of_model(load_recipe("playground", ["model.attention=native"]).model)


def test_shipped_recipes_name_nothing_to_trust_but_what_the_user_has_to_bring():
    from flowtilt.config import recipe_names

    assert all(not trust.of_recipe(load_recipe(name)) for name in recipe_names() if name.startswith("playground"))


def test_reading_and_exporting_never_run_what_a_recipe_names(downloaded, tmp_path):
    recipe(downloaded, f"model.adapter={downloaded}/evil.py:SD3", f"rewards.x={downloaded}/evil.py:score", at="a/b")
    export([downloaded / "a" / "b" / "lora"], tmp_path / "out", "diffusers")
    assert not ran(downloaded)


def test_the_commands_have_the_flag(downloaded, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    recipe(downloaded, f"model.adapter={downloaded}/evil.py:SD3", at="a/b")
    place = str(downloaded / "a" / "b" / "lora")
    for words in (["sample", "a red circle"], ["evaluate", "--images", "2", "-o", "out"]):
        assert main([*words, "--lora", place, "--steps", "1"]) == 2
        said = capsys.readouterr().err
        assert said.count("\n") == 1 and "add --trust" in said and not ran(downloaded)
    assert main(["sample", "a red circle", "--lora", place, "--steps", "1", "--trust"]) == 0
    assert ran(downloaded)


# one's own runs --------------------------------------------------------------------------------------


@pytest.fixture
def own(downloaded):
    """A run made here, by a recipe with code."""
    folder = downloaded.parent / "own"
    runs.create(quick(folder, f"rewards.x={downloaded}/evil.py:score", f"model.adapter={downloaded}/evil.py:SD3")).release()
    shutil.copytree(downloaded / "a" / "b" / "lora", folder / "lora")
    return folder


def test_a_run_made_here_needs_no_flag_until_it_moves_or_its_recipe_changes(own, tmp_path):
    parts = trust.of_recipe(load_recipe(own / "recipe.toml"))
    assert {"rewards.x", "model.adapter"} <= parts.keys()
    trust.check(own, parts, trust=False)
    trust.check(own / ".." / own.name, parts, trust=False)
    with pytest.raises(UserError, match="--trust"):
        trust.check(shutil.copytree(own, tmp_path / "copy"), parts, trust=False)
    (own / "recipe.toml").write_text((own / "recipe.toml").read_text() + "\n")
    with pytest.raises(UserError, match="--trust"):
        trust.check(own, parts, trust=False)
    trust.check(own, parts, trust=True)


def test_nothing_in_the_folder_itself_vouches_for_it(own, tmp_path):
    """Whoever downloads a whole run gets all of its files, hidden ones too."""
    shutil.copytree(own, tmp_path / "a" / "run")
    assert trust.is_ours(own) and not trust.is_ours(tmp_path / "a" / "run")
    shutil.rmtree(own)
    (tmp_path / "a" / "run").rename(own)  # the same recipe in the same place
    assert trust.is_ours(own)


def test_without_a_cache_that_can_be_written_a_run_starts_all_the_same(own, downloaded, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("FLOWTILT_TRUSTED", str(tmp_path / "file"))
    hold = runs.create(quick(tmp_path / "other", f"rewards.x={downloaded}/evil.py:score"))
    hold.release()
    assert not trust.is_ours(hold.folder)


def test_an_export_of_ones_own_run_is_ones_own(own, downloaded, tmp_path):
    (own / "lora" / "README.md").write_text("A LoRA of rank 4 (alpha 4)")
    export([own], tmp_path / "mine", "diffusers")
    assert trust.is_ours(tmp_path / "mine")
    recipe(downloaded, f"rewards.x={downloaded}/evil.py:score", at="a/b")
    (downloaded / "a" / "b" / "lora" / "README.md").write_text("A LoRA of rank 4 (alpha 4)")
    export([downloaded / "a" / "b"], tmp_path / "theirs", "diffusers")
    assert (tmp_path / "theirs" / "recipe.toml").is_file() and not trust.is_ours(tmp_path / "theirs")


# going on with a run ---------------------------------------------------------------------------------


def test_resuming_a_run_from_elsewhere_runs_its_code_only_with_the_flag(downloaded, tmp_path, capsys):
    run = downloaded / "run"
    run.mkdir()
    overrides = [two_blocks(), f"rewards.x={downloaded}/evil.py:score", "rollouts=1"]
    (run / "recipe.toml").write_text(to_toml(load_recipe("playground", [*QUICK, *overrides])))
    assert main(["train", "--resume", str(run)]) == 2
    said = capsys.readouterr().err
    assert "rewards.x" in said and "--trust" in said and said.count("\n") == 1 and not ran(downloaded)
    # an evaluation's reward may be code as well
    (run / "recipe.toml").write_text(to_toml(load_recipe("playground", [*QUICK, 'evaluate.rewards=["evil.py:score"]'])))
    assert main(["train", "--resume", str(run), "rollouts=3"]) == 2
    assert "--trust" in capsys.readouterr().err and not ran(downloaded)


def test_what_the_user_gives_needs_no_flag_and_the_run_is_then_known(downloaded, tmp_path, monkeypatch):
    """The recipe beside --resume is given, and so is --trust; a run that went on here is the user's."""
    run, seen = downloaded / "run", []
    run.mkdir()
    given = to_toml(quick(run, f"rewards.x={downloaded}/evil.py:score"))
    (run / "recipe.toml").write_text(given)
    (tmp_path / "mine.toml").write_text(given)

    class Started(Exception):
        pass

    def trainer(found, resume, world, **options):
        seen.append(found)
        runs.write_recipe(resume, found)
        raise Started

    monkeypatch.setattr("flowtilt.training.trainer.Trainer", trainer)
    for words in (["train", str(tmp_path / "mine.toml"), "--resume", str(run)], ["train", "--resume", str(run)]):
        with pytest.raises(Started):
            main(words)
    assert len(seen) == 2
    write_json(run / "x.json", {})  # other files are not what counts
    (run / "recipe.toml").write_text(given.replace("seed = 0", "seed = 1"))
    assert main(["train", "--resume", str(run)]) == 2
    with pytest.raises(Started):
        main(["train", "--resume", str(run), "--trust"])
