"""Each guard says its sentence once, at its threshold, for the methods that it applies to, and remembers that it has."""

import json
import math

import pytest

from flowtilt.config import known_keys, load_recipe
from flowtilt.methods import built_in
from flowtilt.training.guards import Guards, rules
from flowtilt.training.guards.history import BLOCK, START
from flowtilt.training.guards.rules import RULES

FORWARD = ["nft", "awm", "epg", "pepg", "par", "ram"]
CONTRAST = {"nft": "deviation", "awm": "anchor", "epg": "log_ratio", "pepg": "log_ratio", "par": "log_ratio"}
HEALTHY = {
    "reward/playground": 0.6,
    "reward/playground_std": 0.4,
    "groups/without_variance": 0.1,
    "images/saturated": 0.05,
    "images/blank": 0.0,
    "groups/identical_images": 0.0,
    "missing/playground": 0.0,
    "skipped_updates": 0,
    "grad_norm": 1.0,
    "kl": 0.02,
}
OF_METHOD = {
    "grpo": {"ratio_off": 1e-4, "clip_fraction": 0.4},
    **{kind: {"norm_ratio": 1.02, **({CONTRAST[kind]: 1e-3} if kind in CONTRAST else {})} for kind in FORWARD},
}
SATURATED = HEALTHY["images/saturated"] + rules.SATURATED
TROUBLE = {
    "nan": ("nft", {"skipped_updates": 1, "grad_norm": math.nan}, "optimizer.lr"),
    "missing": ("nft", {"missing/playground": 1.0}, "rewards.playground"),
    "no_variance": ("nft", {"groups/without_variance": rules.NO_VARIANCE}, "rollout.images_per_prompt"),
    "no_contrast": ("nft", {"deviation": 0.0}, "objective.old_policy"),
    "norm_ratio": ("nft", {"norm_ratio": rules.NORM_RATIO}, "objective.norm_guard"),
    "kl": ("nft", {"kl": rules.KL}, "objective.kl"),
    "clipped": ("grpo", {"clip_fraction": 0.475}, "objective.clip_range"),
    "log_ratio": ("epg", {"log_ratio": rules.LOG_RATIO}, "optimizer.lr"),
    "saturated": ("nft", {"images/saturated": SATURATED + 1e-9}, "rewards"),
    "blank": ("nft", {"images/blank": rules.BLANK}, "model.dtype"),
    "identical": ("nft", {"groups/identical_images": rules.IDENTICAL}, "objective.kl"),
}
"""Guards on single rollouts: a method, metrics at the threshold, and a key that the message names."""
TRENDS = ("kl_growth", "reward_falling", "held_out")
each_guard = pytest.mark.parametrize("name", TROUBLE)


def guards(kind="nft", *overrides, state=None):
    settings = [f"objective.type={kind}", "rollout.steps=10", "optimizer.steps_per_rollout=2", *overrides]
    return Guards(load_recipe("playground", settings), state)


def fired(watch, kind, *metrics):
    """Names that fire in each rollout."""
    return [list(watch.check(HEALTHY | OF_METHOD[kind] | m)) for m in metrics]


def begun(kind, *overrides):
    """Guards of a run that has been healthy so far."""
    watch = guards(kind, *overrides)
    assert fired(watch, kind, *[{}] * START) == [[]] * START
    return watch


def test_every_guard_is_tried_here():
    assert {*TROUBLE, *TRENDS} == {*RULES}


# one rollout after the other ---------------------------------------------------------------------------


@each_guard
def test_a_guard_fires_once_at_its_threshold_and_is_silent_from_then_on(name):
    kind, bad, _ = TROUBLE[name]
    patience = RULES[name].patience
    found = fired(begun(kind), kind, *[bad] * (patience + 4))
    assert found == [[]] * (patience - 1) + [[name]] + [[]] * 4


@each_guard
def test_a_guard_that_has_fired_stays_silent_when_the_trouble_comes_back(name):
    kind, bad, _ = TROUBLE[name]
    patience = RULES[name].patience
    assert fired(begun(kind), kind, *[bad] * patience, {}, *[bad] * (patience + 1))[patience:] == [[]] * (patience + 2)


@each_guard
def test_a_healthy_rollout_in_between_starts_the_count_anew(name):
    kind, bad, _ = TROUBLE[name]
    patience, watch = RULES[name].patience, begun(kind)
    assert fired(watch, kind, *([*[bad] * (patience - 1), {}] * 3)) == [[]] * (3 * patience)
    assert fired(watch, kind, *[bad] * patience)[-1] == [name]


@each_guard
def test_a_message_is_one_line_that_names_a_key_to_change(name):
    kind, bad, key = TROUBLE[name]
    watch = begun(kind)
    (message,) = [said for _ in range(5) for said in watch.check(HEALTHY | OF_METHOD[kind] | bad).values()]
    assert key in message and "\n" not in message and not message.endswith(".")
    assert key.partition(".")[0] in {known.name.partition(".")[0] for known in known_keys()}


@pytest.mark.parametrize("kind", [*FORWARD, "grpo"])
def test_healthy_metrics_never_fire(kind):
    assert fired(guards(kind), kind, *[{}] * 60) == [[]] * 60


@pytest.mark.parametrize(
    ("kind", "metrics"),
    [
        ("nft", {"groups/without_variance": rules.NO_VARIANCE - 1e-6}),
        ("nft", {"deviation": 1e-12}),
        ("nft", {"deviation": math.nan}),
        ("nft", {"norm_ratio": rules.NORM_RATIO - 1e-6, "kl": rules.KL - 1e-6}),
        ("nft", {"images/saturated": SATURATED - 1e-6}),
        ("nft", {"images/blank": rules.BLANK - 1e-6, "groups/identical_images": rules.IDENTICAL - 1e-6}),
        ("nft", {"grad_norm": 0.0}),
        ("epg", {"log_ratio": rules.LOG_RATIO - 1e-6}),
        ("grpo", {"clip_fraction": 0.47}),
    ],
)
def test_what_is_just_short_of_trouble_does_not_fire(kind, metrics):
    watch = begun(kind)
    assert fired(watch, kind, *[metrics] * 20) == [[]] * 20


# what applies to which method ---------------------------------------------------------------------------


@pytest.mark.parametrize(("kind", "metric"), CONTRAST.items())
def test_each_method_with_a_contrast_says_what_is_lost_without(kind, metric):
    watch = guards(kind)
    said = [watch.check(HEALTHY | OF_METHOD[kind] | {metric: 0.0}) for _ in range(3)][-1]
    assert built_in()[kind]().contrast.unused in said["no_contrast"]


def test_an_importance_weight_that_is_off_is_no_contrast_to_lose():
    assert fired(guards("epg", "objective.ratio=false"), "epg", *[{"log_ratio": 0.0}] * 20) == [[]] * 20


@pytest.mark.parametrize("kind", ["ram", "grpo"])
def test_on_policy_methods_have_no_contrast_to_lose(kind):
    assert fired(guards(kind), kind, *[{"deviation": 0.0, "anchor": 0.0, "log_ratio": 0.0}] * 20) == [[]] * 20


def test_the_kl_of_a_steps_mean_has_another_unit_and_only_its_growth_is_judged():
    assert fired(guards("grpo"), "grpo", *[{"kl": 3 * rules.KL}] * 20) == [[]] * 20


@pytest.mark.parametrize(("updates", "most"), [(1, 0.0), (2, 0.5), (3, 2 / 3)])
def test_a_rollouts_first_update_cannot_be_clipped(updates, most):
    watch = guards("grpo", f"optimizer.steps_per_rollout={updates}")
    assert fired(watch, "grpo", *[{"clip_fraction": most}] * 3)[-1] == ([] if updates == 1 else ["clipped"])


def test_an_update_without_any_image_is_not_one_without_a_finite_gradient():
    """FlowGRPO leaves groups without variance out; where it leaves all out there is nothing to step on, and no norm."""
    watch = guards("grpo")
    without = {key: value for key, value in HEALTHY.items() if key != "grad_norm"}
    assert not watch.check(without | {"skipped_updates": 2, "groups/without_variance": 1.0})
    assert not watch.check(HEALTHY | {"skipped_updates": 1})


def test_ram_is_told_of_its_own_key():
    watch = guards("ram")
    said = [watch.check(HEALTHY | {"kl": 1.0}) for _ in range(3)][-1]["kl"]
    assert "objective.multiplier" in said and "objective.kl" not in said


def test_rtdmd_is_told_of_its_own_key():
    watch = guards("rtdmd", "rollout.solver=cps", "rollout.steps=4")
    said = [watch.check(HEALTHY | {"groups/identical_images": 1.0}) for _ in range(3)][-1]["identical"]
    assert "objective.matching" in said and "objective.kl" not in said


def test_a_distillation_has_neither_rewards_nor_images_to_watch_but_its_gradients():
    settings = ["objective.type=acdmd", "rollout.solver=cps", "optimizer.steps_per_rollout=1", "rewards.playground=0"]
    watch = Guards(load_recipe("playground", settings))
    healthy = {"fake_loss": 20.0, "fake_grad_norm": 0.2, "teacher_gap": 1.0, "grad_norm": 0.02, "skipped_updates": 0.0}
    for score in (0.1, 0.9, 0.1):
        assert not any(watch.check(healthy) for _ in range(BLOCK))
        assert not watch.check_evaluation({"playground": score}, {"playground": 0.3}, 1000)
    assert list(watch.check(healthy | {"fake_grad_norm": math.nan, "skipped_updates": 1.0})) == ["nan"]


def test_missing_scores_are_told_by_reward_and_number():
    lost = {"missing/ocr": 3.0, "missing/geneval": 0.0, "missing/mine": 1.0}
    said = guards().check(HEALTHY | lost)["missing"]
    assert said.startswith("ocr gave no score to 3 of this rollout's images; mine gave no score to 1 of this rollout's images. They were")
    assert "geneval" not in said and "rewards.ocr and rewards.mine" in said
    assert not guards().check(HEALTHY | dict.fromkeys(lost, 0.0))


def test_guards_count_apart_and_may_fire_together():
    watch = begun("nft")
    both = TROUBLE["no_variance"][1] | TROUBLE["blank"][1]
    assert fired(watch, "nft", *[both] * 5) == [[], [], ["blank"], [], ["no_variance"]]
    late = begun("nft")
    fired(late, "nft", *[TROUBLE["no_variance"][1]] * 2)
    assert fired(late, "nft", *[both] * 3)[-1] == ["no_variance", "blank"]


# checkpoints ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [*TROUBLE, *TRENDS])
def test_a_guard_goes_on_where_it_was_through_a_checkpoint_after_every_rollout(name):
    kind = TROUBLE[name][0] if name in TROUBLE else "nft"
    rollouts = [{}] * START + [TROUBLE[name][1]] * 8 if name in TROUBLE else course(name)
    unbroken = fired(guards(kind, *WATCHED), kind, *rollouts)
    state: dict = {}
    found = []
    for metrics in rollouts:
        watch = guards(kind, *WATCHED, state=json.loads(json.dumps(state)))
        found += fired(watch, kind, metrics)
        state = watch.state
    assert found == unbroken and [name] in found


# trends ------------------------------------------------------------------------------------------------

WATCHED = ["rewards.aesthetic=0.0"]
JITTER = [0.01, -0.02, 0.03, -0.01, 0.0, 0.02, -0.03, 0.01, -0.01, 0.0]


def block(trained, aesthetic=5.0, kl=0.02):
    """Ten rollouts about these means."""
    return [
        {"reward/playground": trained + e, "reward/aesthetic": aesthetic + e, "reward/aesthetic_std": 0.4, "kl": kl * (1 + e)}
        for e in JITTER
    ]


def course(name):
    """Rollouts that provoke a guard on trends, and no other."""
    if name == "kl_growth":
        return block(0.5, kl=0.001) + block(0.5, kl=0.01) + block(0.5, kl=0.045)
    after = block(0.5) + block(0.6)
    return after + (block(0.45) if name == "reward_falling" else block(0.7, aesthetic=4.85))


@pytest.mark.parametrize(("name", "key"), [("kl_growth", "objective.kl"), ("reward_falling", "optimizer.lr"), ("held_out", "rewards")])
def test_a_trend_is_told_when_its_block_ends(name, key):
    watch = guards("nft", *WATCHED)
    said = [watch.check(HEALTHY | OF_METHOD["nft"] | metrics) for metrics in course(name)]
    assert [list(one) for one in said[:-1]] == [[]] * (3 * BLOCK - 1) and list(said[-1]) == [name]
    assert key in said[-1][name] and "\n" not in said[-1][name]


def test_a_held_out_reward_may_fall_with_the_trained_one():
    """Both falling is a collapse, which another guard tells."""
    found = fired(guards("nft", *WATCHED), "nft", *block(0.6), *block(0.4, aesthetic=4.5))
    assert found[-1] == ["reward_falling"]


@pytest.mark.parametrize("aesthetic", [4.91, 5.0, 5.4])
def test_a_held_out_reward_that_hardly_falls_or_rises_is_no_alarm(aesthetic):
    assert fired(guards("nft", *WATCHED), "nft", *block(0.5), *block(0.7, aesthetic=aesthetic)) == [[]] * 20


def test_a_held_out_reward_is_compared_with_its_best_however_slowly_it_falls():
    watch = guards("nft", *WATCHED)
    slowly = [row for k in range(6) for row in block(0.5 + 0.02 * k, aesthetic=5 - 0.025 * k)]
    found = fired(watch, "nft", *slowly)
    assert [k // BLOCK for k, names in enumerate(found) if names == ["held_out"]] == [5]


def test_noise_of_few_images_is_no_fall():
    noisy = [{"reward/playground": 0.6 + 20 * e} for e in JITTER]
    lower = [{"reward/playground": 0.45 + 20 * e} for e in JITTER]
    assert fired(guards(), "nft", *noisy, *lower) == [[]] * 20


def test_kl_may_grow_as_the_square_of_time():
    growing = [{"kl": 1e-5 * n**2} for n in range(1, 101)]
    assert fired(guards("grpo"), "grpo", *growing) == [[]] * 100


def test_rewards_without_a_score_are_left_out_of_a_trend():
    watch = guards("nft", *WATCHED)
    nothing = [{"kl": math.inf, "reward/aesthetic": math.nan, "reward/aesthetic_std": math.nan}] * BLOCK
    assert fired(watch, "nft", *block(0.5), *nothing, *block(0.7, aesthetic=4.85))[-1] == ["held_out"]
    json.dumps(watch.state, allow_nan=False)


# evaluations -------------------------------------------------------------------------------------------


def judged(watch, value, std=0.5, images=240, name="playground_strict"):
    return watch.check_evaluation({"playground": 0.5, name: value}, {"playground": 0.4, name: std}, images)


def test_a_reward_that_is_judged_only_may_not_fall_below_its_best_while_the_trained_one_rises():
    watch = guards()
    assert not judged(watch, 0.4)
    fired(watch, "nft", *[{"reward/playground": 0.5}] * 5)
    assert not judged(watch, 0.7)
    fired(watch, "nft", *[{"reward/playground": 0.8}] * 15)
    assert not judged(watch, 0.6)
    said = judged(watch, 0.55)["held_out"]
    assert "playground_strict fell from 0.7 to 0.55" in said and "\n" not in said
    assert not judged(watch, 0.3)


def test_a_judged_reward_falls_by_more_than_the_noise_of_its_images():
    """Also where the images that are left all score alike."""
    for images, said in ((12, False), (240, True)):
        watch = guards()
        fired(watch, "nft", *[{"reward/playground": 0.5}] * 5)
        judged(watch, 0.4, images=images)
        fired(watch, "nft", *[{"reward/playground": 0.8}] * 15)
        assert bool(judged(watch, 0.0, std=0.0, images=images)) == said


def test_before_the_first_rollout_the_trained_reward_was_what_the_first_ones_have():
    for now, said in ((0.5, True), (0.3, False)):
        watch = guards()
        judged(watch, 0.7)
        fired(watch, "nft", *[{"reward/playground": 0.4}] * START, *[{"reward/playground": now}] * 20)
        assert bool(judged(watch, 0.4)) == said


def test_the_larger_of_two_spreads_is_the_measure_of_a_fall():
    for before, after in ((2.0, 0.1), (0.1, 2.0)):
        watch = guards()
        judged(watch, 5.0, std=before, images=10**6)
        fired(watch, "nft", *[{"reward/playground": 0.4}] * START, *[{"reward/playground": 0.8}] * 20)
        assert not judged(watch, 4.6, std=after, images=10**6)
        assert judged(watch, 4.4, std=after, images=10**6)


@pytest.mark.parametrize(("name", "held_out"), [("playground", False), ("playground/shape", False), ("playground/asked", True)])
def test_the_trained_reward_and_details_that_nobody_asked_for_are_not_held_out(name, held_out):
    watch = guards("nft", "evaluate.rewards=['playground_strict', 'playground/asked']")
    judged(watch, 0.9, name=name)
    fired(watch, "nft", *[{"reward/playground": 0.4}] * START, *[{"reward/playground": 0.8}] * 20)
    assert bool(watch.check_evaluation({name: 0.1}, {name: 0.5}, 240)) == held_out
