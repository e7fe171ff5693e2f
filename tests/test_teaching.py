"""Prompts that teach: what is chosen, how often, and that a resumed run chooses alike."""

import json
from collections import Counter

import pytest
import torch
from conftest import quick

from flowtilt import Trainer
from flowtilt.errors import UserError
from flowtilt.io.files import read_lines
from flowtilt.prompts import Prompt
from flowtilt.prompts.teaching import TeachingPrompts, tag_shares

PROMPTS = [Prompt(f"{tag} {k}", tag) for tag in ("a", "b") for k in range(10)]


def test_tags_of_equal_reward_have_equal_shares_and_the_shares_maximise_what_they_should():
    assert tag_shares({"a": 0.4, "b": 0.4}, ["a", "b"]) == pytest.approx([0.5, 0.5])
    shares = tag_shares({"a": 0.2, "b": 0.8}, ["a", "b"], strength=10)
    v = [0.8, 0.2]  # (1 / r) over their sum
    assert shares == pytest.approx([(1 + 10 * v[0]) / 12, (1 + 10 * v[1]) / 12]) and sum(shares) == pytest.approx(1)
    goal = lambda q: sum(torch.log(torch.tensor(q)) * torch.tensor([1 + 10 * x for x in v]))  # noqa: E731
    for step in (-0.01, 0.01):
        assert goal([shares[0] + step, shares[1] - step]) < goal(shares)


def test_an_unknown_reward_counts_as_the_mean_of_the_others_and_none_at_all_as_alike():
    assert tag_shares({}, ["a", "b", "c"]) == pytest.approx([1 / 3] * 3)
    assert tag_shares({"a": 0.5}, ["a", "b"]) == pytest.approx([0.5, 0.5])


def test_equal_variances_give_uniform_draws_without_a_repeat():
    teaching = TeachingPrompts(PROMPTS, 0, {}, by_variance=True)
    seen = Counter()
    for step in range(400):
        drawn = teaching.take(step, 4)
        assert len({p.text for p in drawn}) == 4
        seen.update(p.text for p in drawn)
    counts = torch.tensor([float(seen[p.text]) for p in PROMPTS])
    assert float(((counts - 80) ** 2 / 80).sum()) < 45  # chi-square, 18 degrees of freedom: p < .0005


def test_prompts_of_a_large_set_come_in_proportion_to_their_probability():
    levels = (0.1, 0.25, 0.5, 1.0)
    teaching = TeachingPrompts([Prompt(str(k)) for k in range(400)], 0, {}, by_variance=True)
    teaching.load(teaching.state() | {"recent": [[levels[k % 4]] for k in range(400)]})
    assert [teaching.probability(k) for k in range(4)] == list(levels)
    seen = Counter(int(p.text) % 4 for step in range(200) for p in teaching.take(step, 40))
    for k, level in enumerate(levels):
        share = level / sum(levels)
        # that no rollout has a prompt twice moves the shares by less than a fifth of a standard error
        assert abs(seen[k] - 8000 * share) < 4 * (8000 * share * (1 - share)) ** 0.5, (level, seen[k])


def test_a_prompt_whose_images_differ_comes_more_often():
    teaching = TeachingPrompts(PROMPTS[:10], 0, {}, by_variance=True)
    seen = Counter()
    for step in range(300):
        drawn = teaching.take(step, 3)
        seen.update(p.text for p in drawn)
        teaching.learn(step, torch.cat([torch.tensor([0.0, 1.0]) if p.text == "a 3" else torch.tensor([0.5, 0.51]) for p in drawn]))
    others = [seen[p.text] for p in PROMPTS[:10] if p.text != "a 3"]
    assert seen["a 3"] > 1.2 * max(others) and min(others) > 0


def test_tags_of_low_reward_come_more_often_and_each_within_one_of_its_share():
    teaching = TeachingPrompts(PROMPTS, 0, None, by_variance=False)
    for step in range(20):
        drawn = teaching.take(step, 6)
        teaching.learn(step, torch.cat([torch.full((2,), 0.1 if p.tag == "a" else 0.9) for p in drawn]))
    counts = Counter(p.tag for p in teaching.take(99, 6))
    share = tag_shares({"a": 0.1, "b": 0.9}, ["a", "b"])[0]
    assert abs(counts["a"] - 6 * share) <= 1 and counts["b"] >= 0


def test_a_missing_reward_teaches_nothing():
    teaching = TeachingPrompts(PROMPTS, 0, None, by_variance=True)
    teaching.take(1, 4)
    teaching.learn(1, torch.full((8,), float("nan")))
    assert teaching.state()["reward"] == {}


@pytest.mark.parametrize("key", ['tags="auto"', "prompts_by=variance"])
def test_a_resumed_run_chooses_what_one_that_was_not_interrupted_does(tmp_path, key):
    log = tmp_path / "seen.jsonl"
    (tmp_path / "reward.py").write_text(
        "import json\ndef reward(images, prompts):\n"
        f"    with open({str(log)!r}, 'a') as f: f.write(json.dumps([p.text for p in prompts]) + chr(10))\n"
        "    return images.mean((1, 2, 3))\n"
    )
    mine = [f"rewards.mine='{tmp_path}/reward.py:reward'", key, "evaluate.every=0", "evaluate.images=4"]
    Trainer(quick(tmp_path / "whole", *mine, "rollouts=3")).run()
    whole = [json.loads(line) for line in log.read_text().splitlines()]
    Trainer(quick(tmp_path / "parts", *mine, "rollouts=2")).run()
    log.unlink()
    Trainer(quick(tmp_path / "parts", *mine, "rollouts=3"), resume=tmp_path / "parts").run()
    last = [json.loads(line) for line in log.read_text().splitlines()]
    third = [prompts for prompts in last if len(prompts) == 12]
    assert third and third[-1] in whole
    lines = [read_lines(tmp_path / name / "metrics.jsonl") for name in ("whole", "parts")]
    assert lines[0][-1]["reward/total"] == lines[1][-1]["reward/total"]


def test_a_distillation_has_no_rewards_to_choose_by():
    from flowtilt.config import load_recipe

    with pytest.raises(UserError, match="acdmd has no rewards to choose prompts by"):
        load_recipe("playground-rtdmd-cold", ["prompts_by=variance"])
