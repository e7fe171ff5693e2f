"""The average's interval: `ema_every` updates from one step of it to the next, as published code counts them."""

import pytest
from conftest import quick

from flowtilt.config import load_recipe
from flowtilt.objectives import ema_decay
from flowtilt.training.learner import averaged_update


class Counted:
    """An optimizer of one role that moves its weight by one with each update."""

    def __init__(self) -> None:
        self.count, self.weight = 0, 0.0

    def step(self, sums, phases):
        self.count += 1
        self.weight += 1.0
        return 1.0


class Averaging:
    """A policy of one number."""

    def __init__(self, update):
        self.update, self.ema = update, 0.0

    def average(self, role, decay):
        assert role == "ema"
        self.ema = decay * self.ema + (1 - decay) * self.update.weight


@pytest.mark.parametrize("every", [1, 3, 8])
def test_the_average_follows_after_every_so_many_updates_with_the_decay_of_that_update(every):
    update = Counted()
    policy, expected = Averaging(update), 0.0
    for s in range(20):
        averaged_update(update, policy, 0.9, every, {}, None)  # pyright: ignore[reportArgumentType]
        if (s + 1) % every == 0:
            expected = ema_decay(s, 0.9) * expected + (1 - ema_decay(s, 0.9)) * (s + 1)
        assert policy.ema == pytest.approx(expected)


def test_the_recipes_that_publish_an_interval_have_it_and_no_other():
    eight = {"sd35m-grpo", "sd35m-grpo-fast", "sd35m-grpo-guard", "sd35m-grpo-ocr", "sd35m-grpo-pickscore", "sd35m-rtdmd-rl"}
    for name in (*eight, "sd35m-geneval", "sd35m-rtdmd-cold", "playground"):
        recipe = load_recipe(name, ["lora.on=[]"] if name == "sd35m-rtdmd-rl" else [])
        assert recipe.ema_every == (8 if name in eight else 1)


def test_rtdmds_second_stage_draws_the_tags_of_its_training_file_as_often_as_they_are_there():
    shares = load_recipe("sd35m-rtdmd-rl").tags
    assert shares == {"position": 7, "counting": 5, "color_attr": 3, "colors": 1, "two_object": 1, "single_object": 0}


def test_a_run_takes_the_key(tmp_path):
    assert quick(tmp_path / "run", "ema_every=4").ema_every == 4
