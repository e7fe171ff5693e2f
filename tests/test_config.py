"""A recipe says what a run is: it reads back equal, and whatever is wrong with it is said in one line."""

import json
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import get_args

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from flowtilt import solvers
from flowtilt.config import (
    EvaluateSettings,
    RewardSettings,
    RolloutSettings,
    known_keys,
    load_recipe,
    recipe_names,
    to_toml,
    validate,
)
from flowtilt.config.given import given_recipe
from flowtilt.errors import UserError
from flowtilt.io.user_code import absolute
from flowtilt.methods import built_in

FEW = settings(deadline=None, max_examples=25)
LEAST = {"model": {"path": "m"}, "prompts": "p.txt", "rewards": {"playground": 1.0}}


def file(folder: Path, text: str, name: str = "mine.toml") -> Path:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    return path


def refusal(source: str | Path, *overrides: str) -> str:
    """What the user reads; always one line."""
    with pytest.raises(UserError) as caught:
        load_recipe(source, overrides)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# reading and writing ---------------------------------------------------------------------------------


@pytest.mark.parametrize("name", recipe_names())
def test_every_shipped_recipe_loads_and_reads_back_equal(name, tmp_path):
    recipe = load_recipe(name)
    assert load_recipe(file(tmp_path, to_toml(recipe))) == recipe
    assert recipe.name == name


def test_the_playground_is_shipped():
    assert "playground" in recipe_names()


plain_text = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=12)
a_weight = st.floats(0.1, 9)
a_reward = st.one_of(a_weight, plain_text, st.builds(dict, source=plain_text, weight=a_weight))


@FEW
@given(
    path=plain_text,
    rewards=st.dictionaries(plain_text.filter(lambda name: "/" not in name and name != "total"), a_reward, min_size=1),
    run=st.none() | plain_text,
    lr=st.floats(1e-12, 10),
    half_life=st.none() | st.integers(1, 10**6),
    track=st.lists(st.sampled_from(["wandb", "tensorboard"])),
)
def test_any_recipe_reads_back_equal(tmp_path_factory, path, rewards, run, lr, half_life, track):
    tree = {
        **LEAST,
        "model": {"path": path},
        "rewards": rewards,
        "run": run,
        "track": track,
        "optimizer": {"lr": lr, "half_life": half_life},
    }
    recipe = validate(tree, {}, "tree")
    text = to_toml(recipe)
    assert validate(tomllib.loads(text), {}, "toml") == recipe
    folder = tmp_path_factory.getbasetemp()
    assert load_recipe(file(folder, text)) == recipe


def test_strings_of_every_awkward_character_read_back_equal(tmp_path):
    awkward = "".join(map(chr, range(0x00, 0x30))) + '\\"\x7f\x85\u2028\ufeff😀'
    recipe = validate({**LEAST, "prompts": awkward, "rewards": {awkward.replace("/", ""): 1.0}}, {}, "tree")
    assert load_recipe(file(tmp_path, to_toml(recipe))) == recipe


def test_every_key_has_a_meaning_and_may_be_set_by_its_name():
    recipe = load_recipe("playground")
    for known in known_keys():
        key = known.name
        assert known.field.description, key
        if known.types and "nft" not in known.types:
            continue
        value = recipe.model_dump(mode="json")
        for part in key.split("."):
            value = value[part]
        if value is not None and key != "rewards":
            assert load_recipe("playground", [f"{key}={json.dumps(value)}"]) == recipe, key


def test_a_recipe_cannot_be_changed_after_it_was_checked():
    with pytest.raises(ValidationError, match="frozen"):
        load_recipe("playground").rollouts = 3


def test_solvers_are_the_same_in_recipes_and_in_the_solvers_file():
    for table in (RolloutSettings, EvaluateSettings):
        assert get_args(table.model_fields["solver"].annotation) == solvers.SAMPLERS


def test_reading_a_recipe_imports_no_torch():
    code = (
        "import sys, flowtilt, flowtilt.config, flowtilt.cli; flowtilt.config.load_recipe('playground', ['rollouts=3']);"
        "heavy = {'torch', 'diffusers', 'transformers', 'peft', 'numpy'} & set(sys.modules); sys.exit(str(heavy) if heavy else 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


# overrides -------------------------------------------------------------------------------------------


def test_overrides_are_parsed_as_toml_and_a_bare_word_is_a_string():
    recipe = load_recipe(
        "playground",
        [
            "rollouts=7",
            "optimizer.lr = 2e-4",
            "guards=stop",
            'name="x.y"',
            "track=['wandb']",
            "run=runs/a b",
            "rollout.solver=dpm2",
            "lora.rank=0x10",
        ],
    )
    assert (recipe.rollouts, recipe.optimizer.lr, recipe.guards, recipe.name) == (7, 2e-4, "stop", "x.y")
    assert (recipe.track, recipe.run, recipe.rollout.solver, recipe.lora.rank) == (("wandb",), "runs/a b", "dpm2", 16)


def test_an_override_changes_only_its_key_and_the_last_one_holds():
    before, after = load_recipe("playground"), load_recipe("playground", ["rollout.prompts=3", "rollout.prompts=4"])
    assert after.rollout.prompts == 4
    assert after == before.model_copy(update={"rollout": before.rollout.model_copy(update={"prompts": 4})})


def test_a_run_may_be_named_by_a_date():
    assert load_recipe("playground", ["run=2026-01-31"]).run == "2026-01-31"
    assert "rollouts: must be a valid integer, not '2026-01-31' [command line: rollouts=2026-01-31]" in refusal(
        "playground", "rollouts=2026-01-31"
    )


def test_a_value_may_hold_the_equals_sign():
    assert load_recipe("playground", ["run=a=b"]).run == "a=b"


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("steps", "override 'steps' is not key=value"),
        ("=3", "override '=3' is not key=value"),
        ("rollouts.x=3", "override 'rollouts.x=3': 'rollouts' is a value, not a table"),
        ("rollout.solver.name=3", "'solver' is a value, not a table"),
    ],
)
def test_an_override_that_is_not_a_key_and_value_is_refused(override, message):
    assert message in refusal("playground", override)


# rewards and the model in their forms ----------------------------------------------------------------


def test_the_three_forms_of_a_reward_are_one_table(tmp_path):
    text = 'model = "m"\nprompts = "p.txt"\n[rewards]\nplayground = 0.5\nmine = "file.py:f"\nother = { source = "g.py:h", weight = 2 }\n'
    assert load_recipe(file(tmp_path, text)).reward_table() == {
        "playground": RewardSettings(source="playground", weight=0.5),
        "mine": RewardSettings(source=absolute("file.py:f"), weight=1.0),
        "other": RewardSettings(source=absolute("g.py:h"), weight=2.0),
    }
    assert load_recipe("playground", ["rewards.mine=file.py:f"]).reward_table()["mine"].source == absolute("file.py:f")
    assert load_recipe("playground", ["rewards.mine={source='f.py:g', weight=0}"]).reward_table()["mine"].weight == 0


def test_a_model_may_be_named_alone(tmp_path):
    path = file(tmp_path, 'model = "some/pipeline"\nprompts = "p.txt"\nrewards.playground = 1\n')
    assert load_recipe(path).model.path == "some/pipeline"
    before = load_recipe("playground").model
    assert load_recipe("playground", ["model=other"]).model == before.model_copy(update={"path": "other"})


# what is wrong, where, and what was meant ------------------------------------------------------------

METHODS = f'objective.type: must be one of {", ".join(map(repr, built_in()))}, or "file.py:Class"'
WRONG = [
    ("objective.bta=0.2", "objective.bta: unknown key; did you mean 'objective.beta'?"),
    ("rolout.steps=3", "rolout: unknown key; did you mean 'rollout'?"),
    ("rolouts=3", "rolouts: unknown key; did you mean 'rollouts'?"),
    ("lr=1", "lr: unknown key; did you mean 'optimizer.lr'?"),
    ("beta=1", "beta: unknown key; did you mean 'objective.beta'?"),
    ("rollout.step=1", "rollout.step: unknown key; did you mean 'rollout.steps'?"),
    ("rewards={total=1.0,playground=1.0}", "rewards.total: metrics have such names"),
    ("rewards.q={source='x', wieght=1}", "rewards.q.wieght: unknown key; did you mean 'rewards.q.weight'?"),
    ("qqq=1", "qqq: unknown key; `flowtilt keys` lists all"),
    ("rollouts=lots", "rollouts: must be a valid integer, not 'lots'"),
    ("rollouts=1.5", "rollouts: must be a valid integer, not 1.5"),
    ("rollouts=0", "rollouts: must be greater than or equal to 1, not 0"),
    ("seed=true", "seed: must be a valid integer, not True"),
    ("seed=-1", "seed: must be greater than or equal to 0, not -1"),
    ("optimizer.lr=nan", "optimizer.lr: must be a finite number, not nan"),
    ("optimizer.lr=inf", "optimizer.lr: must be a finite number, not inf"),
    ("objective.beta=0", "objective.beta: must be greater than 0, not 0"),
    (
        "objective.type=nfr",
        f"{METHODS}, not 'nfr'",
    ),
    (
        "objective.type=3",
        f"{METHODS}, not 3",
    ),
    (
        "objective.type=['x']",
        f"{METHODS}, not ['x']",
    ),
    ("objective=3", "objective: must be an object, not 3"),
    (
        "objective.clip_range=1",
        "objective.clip_range: belongs to objective.type = 'awm', 'dgpo', 'grpo' or 'rtdmd', not 'nft'",
    ),
    (
        "objective.scale=1",
        "objective.scale: belongs to objective.type = 'epg', 'par' or 'pepg', not 'nft'",
    ),
    ("objective.mutliplier=1", "objective.mutliplier: unknown key; 'objective.multiplier' belongs to objective.type = 'ram', not 'nft'"),
    ("rollout.solver=dpm3", "rollout.solver: must be 'euler', 'ddim', 'dpm1', 'dpm2', 'heun' or 'cps', not 'dpm3'"),
    ("track=['wnb']", "track: must be 'wandb', 'tensorboard', 'trackio' or 'mlflow', not 'wnb'"),
    ("track=wandb", "track: must be a valid array, not 'wandb'"),
    ("name=a/b", "name: String should match pattern"),
    ("model=", "model.path: is empty, give it a value"),
    ("model={}", "model.path: is missing"),
    ("model=3", "model: must be an object, not 3"),
    ("rollout=5", "rollout: must be an object, not 5"),
    ("rewards={}", "rewards: Dictionary should have at least 1 item"),
    ("rewards.q=true", "rewards.q: must be a valid number or must be a valid string or must be an object, not True"),
    ("rewards.playground=0", "rewards: every weight is 0"),
    ("micro_batch=foo", "micro_batch: must be a valid integer or must be 'auto', not 'foo'"),
    ("micro_batch=0", "micro_batch: must be at least 1"),
    ("optimizer.betas=[0.9]", "optimizer.betas: has too few values"),
    ("optimizer.betas=[0.9, 1.0]", "optimizer.betas: each must be at least 0 and below 1"),
    ("optimizer.steps_per_rollout=145", "optimizer.steps_per_rollout: more steps than the 144 trained images of a rollout"),
]


@pytest.mark.parametrize(("override", "message"), WRONG)
def test_a_wrong_value_is_one_line_that_names_the_key_where_it_was_set_and_what_was_meant(override, message):
    said = refusal("playground", override)
    assert said.startswith(f"recipe playground: {message}")
    assert said.endswith(f"[command line: {override}]")
    assert "; " not in said.replace("unknown key; ", "")  # nothing else is complained about


def test_an_error_of_the_file_names_the_file_and_one_of_its_base_names_the_base(tmp_path):
    base = file(tmp_path, 'base = "playground"\nseed = -1\nrollout = 3\nrollouts = 1.5\n', "base.toml")
    mine = file(tmp_path, 'base = "base.toml"\nname = ""\nrollouts = 2.5\nmodel = ""\n')
    said = refusal(mine, "guards=loud")
    for key, origin in (
        ("seed", base),
        ("rollout", base),
        ("name", mine),
        ("rollouts", mine),
        ("model.path", mine),
        ("guards", "command line: guards=loud"),
    ):
        [problem] = [part for part in said.removeprefix(f"recipe {mine}: ").split("; ") if part.startswith(f"{key}: ")]
        assert problem.endswith(f"[{origin}]"), problem


def test_all_problems_are_said_at_once():
    overrides = ["rollouts=lots", "objective.bta=1", "optimizer.lr=nan", "rollout.guidance=0.5", "evaluate.solver=x"]
    said = refusal("playground", *overrides)
    for override in overrides:
        assert said.count(f"[command line: {override}]") == 1
        assert f"{override.partition('=')[0]}: " in said


def test_the_keys_that_a_recipe_must_have_are_all_named(tmp_path):
    path = file(tmp_path, "rollouts = 3\n")
    assert refusal(path) == f"recipe {path}: " + "; ".join(f"{key}: is missing [{path}]" for key in ("model", "prompts", "rewards"))


def test_more_training_times_than_noise_levels_are_refused():
    said = refusal("playground", "objective.times=rollout", "objective.times_per_image=9", "rollout.steps=8")
    assert "objective.times_per_image: a rollout of 8 steps has no 9 noise levels" in said
    assert load_recipe("playground", ["objective.times=stratified", "objective.times_per_image=9", "rollout.steps=8"])


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"steps = \n", "not TOML: Invalid value"),
        (b"steps = 1\nsteps = 2\n", "not TOML: Cannot overwrite a value"),
        ('name = "Bär"\n'.encode("latin-1"), "not UTF-8 text"),
    ],
)
def test_a_file_that_is_not_toml_is_refused_by_name(tmp_path, data, message):
    path = tmp_path / "mine.toml"
    path.write_bytes(data)
    assert refusal(path).startswith(f"recipe {path}: {message}")


def test_a_byte_order_mark_does_not_matter(tmp_path):
    path = tmp_path / "mine.toml"
    path.write_bytes(b'\xef\xbb\xbfbase = "playground"\n')
    assert load_recipe(path) == load_recipe("playground")


def test_a_name_that_is_almost_a_recipe_is_answered_with_that_recipe(tmp_path):
    assert refusal("playgroud") == "recipe 'playgroud': no such recipe or file; did you mean 'playground'?"
    assert "give a .toml file or one of: " in refusal("zzz")
    assert "no such recipe or file" in refusal(tmp_path)


@pytest.mark.parametrize("item", ["rewards.foo=", "prompts=", "rewards="])
def test_an_empty_value_is_called_empty(item):
    with pytest.raises(UserError, match=rf"{item[:-1]}: is empty, give it a value \[command line: {item}\]"):
        load_recipe("playground", [item])


def test_the_example_reward_of_a_recipe_goes_where_another_one_is_set(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert list(load_recipe("sd35m", ["rewards.ocr=1"]).rewards) == ["ocr"]
    assert list(load_recipe("sd35m").rewards) == ["mine"]
    assert list(load_recipe("sd35m", ["rewards.ocr=1", "rewards.mine=other.py:f"]).rewards) == ["mine", "ocr"]
    (tmp_path / "my_reward.py").touch()
    assert list(load_recipe("sd35m", ["rewards.ocr=0"]).rewards) == ["mine", "ocr"]


def test_the_name_of_a_key_in_the_version_before_is_read_with_a_hint(tmp_path, capsys):
    path = file(tmp_path, 'base = "playground"\nsteps = 5\n')
    assert load_recipe(path).rollouts == 5
    assert "'steps' is called 'rollouts'" in capsys.readouterr().err
    assert load_recipe(path, ["steps=7"]).rollouts == 7 and given_recipe("playground", keys={"steps": 8})[0].rollouts == 8
    capsys.readouterr()
    assert load_recipe(path, stored=True).rollouts == 5 and not capsys.readouterr().err  # a run of that version
    with pytest.raises(UserError, match="steps: unknown key"):
        load_recipe(file(tmp_path, 'base = "playground"\nsteps = 5\nrollouts = 5\n', "both.toml"))
