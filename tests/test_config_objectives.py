"""The `[objective]` of a recipe: each method has its own keys, and a key of another one names its owner."""

import pytest

from flowtilt.build import build_objective
from flowtilt.config import Recipe, known_keys, load_recipe
from flowtilt.errors import UserError
from flowtilt.methods import built_in
from flowtilt.methods.nft import NFTSettings

OF_STUDENTS = ("acdmd", "rtdmd")
"""RTDMD's two stages, which are no `Objective`: they want few steps of cps, one of them no reward."""
OF_PAIRS = ("dpo", "dpo-offline")
"""They compare pairs of images; one samples them, one reads them."""
OF_GRADIENTS = ("mend",)
"""They follow a reward's gradient, which a recipe has to name."""
EVERY = tuple(built_in())
KINDS = tuple(kind for kind in EVERY if kind not in (*OF_STUDENTS, *OF_PAIRS, *OF_GRADIENTS))
LEAST = {"model": {"path": "m"}, "prompts": "p.txt", "rewards": {"playground": 1.0}}
STEPS = "rollout.steps=9"  # as many levels as most methods train on by default


def leaves(tree: dict, prefix: str = "") -> set[str]:
    found = set()
    for key, value in tree.items():
        found |= (
            leaves(value, f"{prefix}{key}.")
            if isinstance(value, dict) and key not in ("rewards", "tags", "options", "backprop", "improve")
            else {prefix + key}
        )
    return found


def options(kind: str) -> set[str]:
    return set(type(load_recipe("playground", [f"objective.type={kind}", STEPS]).objective).model_fields)


@pytest.mark.parametrize("kind", EVERY)
def test_known_keys_are_the_dotted_leaves_of_a_recipe_of_each_objective(kind):
    students = {"rollout": {"solver": "cps"}, "optimizer": {"steps_per_rollout": 1}, "rewards": {"playground": float(kind == "rtdmd")}}
    pairs = {"rollout": {"images_per_prompt": 2}, "rewards": {"playground": 0.0}}
    needed = students if kind in OF_STUDENTS else pairs if kind == "dpo-offline" else {}
    own = {"dpo-offline": {"pairs": "pairs.jsonl"}, "mend": {"improve": {"playground": 1.0}}}.get(kind, {})
    needed |= {"rollout": {"solver": "euler"}} if kind == "mend" else {}
    recipe = Recipe.model_validate(LEAST | needed | {"objective": {"type": kind, **own}})
    known = [key for key in known_keys() if not key.types or kind in key.types]
    assert {key.name for key in known} == leaves(recipe.model_dump()) and len(known) == len({key.name for key in known})
    for key in known:  # and with this objective's own default
        if key.name.startswith("objective.") and key.name.removeprefix("objective.") not in own:
            assert key.field.get_default(call_default_factory=True) == getattr(recipe.objective, key.name.removeprefix("objective.")), key


def test_the_type_comes_first():
    names = [key.name for key in known_keys() if key.name.startswith("objective.")]
    assert names[: len(EVERY)] == ["objective.type"] * len(EVERY) and "objective.type" not in names[len(EVERY) :]


def test_a_table_without_a_type_is_diffusionnfts(tmp_path):
    path = tmp_path / "mine.toml"
    path.write_text('model = "m"\nprompts = "p.txt"\nrewards.playground = 1\n[objective]\nbeta = 0.3\n')
    assert load_recipe(path).objective == NFTSettings(beta=0.3)
    above = tmp_path / "above.toml"
    above.write_text('base = "mine.toml"\n[objective]\ntype = "nft"\nkl = 0.0\n')
    assert load_recipe(above).objective == NFTSettings(beta=0.3, kl=0.0)  # the same method keeps what it had
    assert load_recipe(path, ["objective.type=nft"]).objective == NFTSettings(beta=0.3)


@pytest.mark.parametrize("kind", KINDS[1:])
def test_another_objective_starts_from_its_own_defaults(kind, tmp_path):
    objective = load_recipe("playground", [f"objective.type={kind}", STEPS]).objective
    assert objective.type == kind and objective == type(objective)()
    assert kind == "grpo" or objective.times == "rollout"  # not the playground's
    path = tmp_path / "mine.toml"
    path.write_text(f'base = "playground"\nrollout.steps = 9\nobjective.type = "{kind}"\n')
    assert load_recipe(path).objective == objective


@pytest.mark.parametrize("kind", KINDS)
def test_an_option_of_another_objective_names_all_its_owners(kind):
    every = set().union(*map(options, KINDS))
    for option in every - options(kind):
        with pytest.raises(UserError) as caught:
            load_recipe("playground", [f"objective.type={kind}", STEPS, f"objective.{option}=1"])
        said = str(caught.value)
        assert said.startswith(f"recipe playground: objective.{option}: belongs to objective.type = ") and "\n" not in said
        owners = said.partition("objective.type = ")[2].partition(", not ")[0]
        assert {owner for owner in KINDS if repr(owner) in owners} == {owner for owner in KINDS if option in options(owner)}
        assert f", not {kind!r}" in said and said.endswith(f"[command line: objective.{option}=1]")


def test_an_option_that_is_misspelt_is_looked_for_at_home_first():
    with pytest.raises(UserError, match=r"objective\.multiplie: unknown key; did you mean 'objective\.multiplier'"):
        load_recipe("playground", ["objective.type=ram", STEPS, "objective.multiplie=1"])


@pytest.mark.parametrize(
    ("overrides", "reference"),
    [
        (["objective.kl=0"], False), (["objective.kl=1"], True), (["objective.norm_guard=1"], True),
        (["objective.type=ram"], True), (["objective.type=epg"], True), (["objective.type=epg", "objective.kl=0"], False),
    ],
)  # fmt: skip
def test_settings_and_method_agree_on_whether_the_reference_is_asked(overrides, reference):
    settings = load_recipe("playground", [*overrides, STEPS]).objective
    assert settings.reference == reference == build_objective(settings).reference


@pytest.mark.parametrize("kind", KINDS)
def test_every_setting_reaches_the_method(kind):
    own = "objective.span=[1,4]" if kind == "grpo" else "objective.norm_guard=0.7"
    settings = load_recipe("playground", [f"objective.type={kind}", STEPS, own]).objective
    method = build_objective(settings)
    assert type(method).__name__.lower() == kind
    for name, value in settings.model_dump(exclude={"type", "times", "times_per_image"}).items():
        assert getattr(method, name) == value


@pytest.mark.parametrize("place", ["playground", "sd35m"])
@pytest.mark.parametrize("kind", KINDS[1:])
def test_each_has_a_recipe_that_differs_in_the_objective_and_what_it_must_have(place, kind):
    ours, base = load_recipe(f"{place}-{kind}"), load_recipe("playground" if place == "playground" else "sd35m-geneval")
    assert ours.objective.type == kind
    differing = {name for name in type(ours).model_fields if getattr(ours, name) != getattr(base, name)}
    more = {"grpo": {"evaluate", "ema_every"}, "dgpo": {"lora"}}.get(kind, set())
    assert differing <= {"name", "objective", "advantage", "optimizer", "ema", "rollout", "rollouts"} | more
    assert (
        ours.advantage == ("global" if place == "sd35m" and kind != "dgpo" else "group")
        if kind in ("awm", "awr", "crd", "dgpo", "grpo")
        else ours.advantage == "none"
    )
    assert place == "playground" or ours.optimizer.lr == base.optimizer.lr
