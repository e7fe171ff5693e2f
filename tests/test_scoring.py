"""Scores of a rollout in parts: the same as in one, in order, and never a reason to wait."""

import subprocess
import sys
import threading

import pytest
import torch

from flowtilt import RewardOutput, UserError
from flowtilt.prompts import Prompt
from flowtilt.rewards.overlapped import PARTS, Scoring

IMAGES = torch.linspace(0, 1, 20).view(20, 1, 1, 1).repeat(1, 3, 4, 4)
PROMPTS = [Prompt(str(k)) for k in range(20)]


def brightness(images, prompts):
    return images.mean((1, 2, 3))


class Elsewhere:
    off_device = True

    def __call__(self, images, prompts):
        assert not torch.is_grad_enabled()  # also in its thread
        numbers = torch.tensor([float(prompt.text) for prompt in prompts])
        return RewardOutput(numbers, details={"twice": 2 * numbers})


def scored(rewards):
    with Scoring(rewards) as scoring:
        for rows in scoring.parts(20):
            scoring.add(IMAGES[rows].clone(), [PROMPTS[k] for k in rows])
        return len(scoring.parts(20)), *scoring.finish()


def test_parts_change_nothing_and_columns_keep_the_order_of_the_rewards():
    parts, scores, missing = scored({"there": Elsewhere(), "here": brightness})
    assert 1 < parts <= PARTS and list(scores) == ["there", "there/twice", "here"]
    assert scores["there"].tolist() == list(range(20)) and torch.equal(scores["here"], brightness(IMAGES, PROMPTS))
    assert not missing["there"].any() and not missing["here"].any()


def test_without_a_judge_elsewhere_a_rollout_is_one_part():
    assert scored({"here": brightness})[0] == 1


def test_a_score_is_missing_only_where_the_reward_applies():
    class Odd:
        def applies(self, prompt):
            return "" if int(prompt.text) % 2 else "even"

        def __call__(self, images, prompts):
            return torch.full((len(images),), torch.nan)

    _, scores, missing = scored({"odd": Odd()})
    assert scores["odd"].isnan().all() and missing["odd"].tolist() == [k % 2 == 1 for k in range(20)]


def test_an_image_that_is_not_finite_has_no_score_whatever_the_reward_makes_of_it():
    images = IMAGES.clone()
    images[3, 0, 0, 0], images[5, 1, 2, 3] = torch.nan, torch.inf
    with Scoring({"blind": lambda images, prompts: torch.ones(len(images)), "there": Elsewhere()}) as scoring:
        scoring.add(images, PROMPTS)
        scores, missing = scoring.finish()
    for column in ("blind", "there", "there/twice"):
        assert scores[column].isnan().nonzero().flatten().tolist() == [3, 5]
    assert int(missing["blind"].sum()) == 2


def test_an_error_elsewhere_is_the_runs_error():
    class Broken:
        off_device = True

        def __call__(self, images, prompts):
            raise RuntimeError("no route to host")

    with pytest.raises(UserError, match="reward broken failed: RuntimeError: no route to host"):
        scored({"broken": Broken()})


def test_leaving_early_waits_for_no_judge():
    asked, release = threading.Event(), threading.Event()

    class Slow:
        off_device = True

        def __call__(self, images, prompts):
            asked.set()
            assert release.wait(60)
            return brightness(images, prompts)

    with pytest.raises(KeyboardInterrupt), Scoring({"slow": Slow()}) as scoring:
        scoring.add(IMAGES, PROMPTS)
        assert asked.wait(60)
        raise KeyboardInterrupt
    assert not release.is_set()  # the judge is still at it
    release.set()


def test_a_program_ends_while_a_judge_is_still_at_it():
    code = """
import time, torch
from flowtilt.rewards.overlapped import Scoring
from flowtilt.io import threads
from flowtilt.io.threads import in_threads
threads.GRACE = 1.0
class Slow:
    off_device = True
    def __call__(self, images, prompts):
        return in_threads([lambda: time.sleep(600)], 4)
from flowtilt.prompts import Prompt
with Scoring({"slow": Slow()}) as scoring:
    scoring.add(torch.zeros(1, 3, 2, 2), [Prompt("a")])
    time.sleep(0.5)
"""
    assert subprocess.run([sys.executable, "-c", code], timeout=60).returncode == 0


def test_rewards_beside_each_other_see_the_images_that_were_drawn():
    def careless(images, prompts):
        return images.sub_(0.5).mean((1, 2, 3))

    _, scores, _ = scored({"careless": careless, "here": brightness})
    assert torch.equal(scores["here"], brightness(IMAGES, PROMPTS))
