"""Each guard says its sentence once, at its threshold, and remembers that it has."""

import json
import math

import pytest

from flowtilt.guards import NO_CONTRAST_ROLLOUTS, NO_VARIANCE_ROLLOUTS, NO_VARIANCE_SHARE, Guards

HEALTHY = {"groups/without_variance": 0.1, "deviation": 1e-3, "skipped_updates": 0, "loss": 0.4, "grad_norm": 1.0}
TROUBLE = {
    "nan": ({"skipped_updates": 1}, 1),
    "no_variance": ({"groups/without_variance": NO_VARIANCE_SHARE}, NO_VARIANCE_ROLLOUTS),
    "no_contrast": ({"deviation": 0.0}, NO_CONTRAST_ROLLOUTS),
}
each_guard = pytest.mark.parametrize("name", TROUBLE)


def fired(guards: Guards, *metrics: dict[str, float]) -> list[list[str]]:
    """Names that fire in each rollout."""
    return [list(guards.check(HEALTHY | m)) for m in metrics]


@each_guard
def test_a_guard_fires_once_at_its_threshold_and_is_silent_from_then_on(name):
    bad, patience = TROUBLE[name]
    assert fired(Guards(), *[bad] * (patience + 20)) == [[]] * (patience - 1) + [[name]] + [[]] * 20


@each_guard
def test_a_guard_that_has_fired_stays_silent_when_the_trouble_comes_back(name):
    bad, patience = TROUBLE[name]
    assert fired(Guards(), *[bad] * patience, {}, *[bad] * (patience + 1))[patience:] == [[]] * (patience + 2)


@each_guard
def test_a_healthy_rollout_in_between_starts_the_count_anew(name):
    bad, patience = TROUBLE[name]
    guards = Guards()
    assert fired(guards, *([*[bad] * (patience - 1), {}] * 3)) == [[]] * (3 * patience)
    assert fired(guards, *[bad] * patience)[-1] == [name]


@each_guard
def test_a_guard_goes_on_counting_and_stays_silent_through_a_checkpoint(name):
    """The state travels as JSON, as in a checkpoint, after every rollout."""
    bad, patience = TROUBLE[name]
    state: dict[str, int] = {}
    found = []
    for _ in range(patience + 5):
        guards = Guards(json.loads(json.dumps(state)))
        found += fired(guards, bad)
        state = guards.state
    assert found == [[]] * (patience - 1) + [[name]] + [[]] * 5


def test_healthy_metrics_never_fire():
    assert fired(Guards(), *[{}] * 50) == [[]] * 50


@pytest.mark.parametrize(
    "metrics",
    [
        {"groups/without_variance": NO_VARIANCE_SHARE - 1e-6},
        {"deviation": 1e-12},
        {"deviation": math.nan},
        {"loss": 0.0, "grad_norm": 0.0},
    ],
)
def test_what_is_just_short_of_trouble_does_not_fire(metrics):
    assert fired(Guards(), *[metrics] * 20) == [[]] * 20


def test_an_objective_without_an_old_policy_has_no_contrast_to_lose():
    metrics = {key: value for key, value in HEALTHY.items() if key != "deviation"}
    guards = Guards()
    assert not any(guards.check(metrics) for _ in range(20))


def test_missing_scores_are_told_by_reward_and_number():
    lost = {"missing/ocr": 3.0, "missing/geneval": 0.0, "missing/mine": 1.0}
    said = Guards().check(HEALTHY | lost)["missing"]
    assert said.startswith("ocr gave no score to 3 of this rollout's images; mine gave no score to 1 of this rollout's images. They were")
    assert "geneval" not in said and "\n" not in said
    assert not Guards().check(HEALTHY | dict.fromkeys(lost, 0.0))


def test_guards_count_apart_and_may_fire_together():
    together = {key: value for bad, _ in TROUBLE.values() for key, value in bad.items()}
    found = fired(Guards(), *[together] * 10)
    assert {name: found.index([name]) + 1 for name in TROUBLE} == {name: patience for name, (_, patience) in TROUBLE.items()}
    late = Guards()
    fired(late, *[TROUBLE["no_variance"][0]] * (NO_VARIANCE_ROLLOUTS - NO_CONTRAST_ROLLOUTS))
    assert fired(late, *[together] * NO_CONTRAST_ROLLOUTS)[-1] == ["no_variance", "no_contrast"]


def test_a_message_is_one_line_that_names_a_key_to_change():
    guards = Guards()
    together = HEALTHY | {key: value for bad, _ in TROUBLE.values() for key, value in bad.items()}
    said = {name: message for _ in range(10) for name, message in guards.check(together).items()}
    assert set(said) == set(TROUBLE)
    for name, key in (("nan", "optimizer.lr"), ("no_variance", "rollout.images_per_prompt"), ("no_contrast", "objective.old_policy")):
        assert key in said[name] and "\n" not in said[name]
