"""A recipe that starts from another one."""

import pytest
from test_config import file, refusal

from flowtilt.config import (
    load_recipe,
)
from flowtilt.config.given import given_recipe
from flowtilt.errors import UserError
from flowtilt.io.user_code import absolute

# one recipe from another -----------------------------------------------------------------------------


def test_a_recipe_says_only_what_differs_from_its_base(tmp_path):
    path = file(tmp_path, 'base = "playground"\nname = "mine"\nmodel = "other"\n[rollout]\nprompts = 3\n')
    base = load_recipe("playground")
    expected = {
        "name": "mine",
        "model": base.model.model_copy(update={"path": "other"}),
        "rollout": base.rollout.model_copy(update={"prompts": 3}),
    }
    assert load_recipe(path) == base.model_copy(update=expected)


def test_a_base_may_be_a_file_beside_the_recipe_and_have_a_base_itself(tmp_path, monkeypatch):
    file(tmp_path, 'base = "playground"\nrollouts = 5\nseed = 1\n', "deep/first.toml")
    file(tmp_path, 'base = "deep/first.toml"\nseed = 2\n', "second.toml")
    for source in (tmp_path / "second.toml", "second.toml"):
        monkeypatch.chdir(tmp_path)
        recipe = load_recipe(source, ["name=third"])
        assert (recipe.name, recipe.rollouts, recipe.seed) == ("third", 5, 2)
        assert recipe.rollout == load_recipe("playground").rollout


def test_rewards_are_added_to_those_of_the_base(tmp_path):
    path = file(tmp_path, 'base = "playground"\n[rewards]\nplayground = 0\nmodel = "f.py:g"\n')
    assert {name: r.weight for name, r in load_recipe(path).reward_table().items()} == {"playground": 0, "model": 1}
    assert load_recipe(path).rewards["model"] == absolute("f.py:g")  # only the top level's `model` is the model


@pytest.mark.parametrize("absolute", [False, True])
def test_recipes_that_start_from_each_other_are_refused(tmp_path, monkeypatch, absolute):
    monkeypatch.chdir(tmp_path)
    file(tmp_path, 'base = "b.toml"\n', "a.toml")
    file(tmp_path, 'base = "../sub/a.toml"\n', "sub/b.toml")
    file(tmp_path, 'base = "b.toml"\n', "sub/a.toml")
    file(tmp_path, 'base = "self.toml"\n', "self.toml")
    for name in ("sub/a.toml", "self.toml"):
        assert "comes back to itself" in refusal(tmp_path / name if absolute else name)


@pytest.mark.parametrize(
    ("base", "message"), [("3", "base = 3 must name another recipe"), ('"nothing.toml"', "nothing.toml': no such recipe")]
)
def test_a_base_that_is_no_recipe_is_refused(tmp_path, base, message):
    assert message in refusal(file(tmp_path, f"base = {base}\n"))


def test_a_reward_alone_takes_the_place_of_the_bases_and_of_its_score(tmp_path):
    base = load_recipe("playground")
    assert base.evaluate.rewards == ("playground_strict",)
    for found in (
        load_recipe("playground", ["rewards=f.py:bright"]),
        load_recipe("playground", ['rewards={bright="f.py:bright"}']),
        load_recipe(file(tmp_path, 'base = "playground"\nrewards = "f.py:bright"\n')),
        given_recipe({"base": "playground", "rewards": "f.py:bright"})[0],
        given_recipe("playground", "f.py:bright")[0],
    ):
        assert list(found.rewards) == ["bright"] and found.evaluate.rewards == ()
    kept = load_recipe("playground", ['evaluate.rewards=["playground_strict"]', "rewards=f.py:bright"])
    assert kept.evaluate.rewards == ("playground_strict",)  # what is said beside it counts, before or after
    added = load_recipe("playground", ["rewards.mine=f.py:bright"])
    assert list(added.rewards) == ["playground", "mine"] and added.evaluate.rewards == ("playground_strict",)
    with pytest.raises(UserError, match="needs a name, as in geneval=http://host:1"):
        load_recipe("playground", ["rewards=http://host:1"])
