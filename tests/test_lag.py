"""A lag: the policy that samples is a fixed number of rollouts old, whatever the time that rewards take."""

import json
import shutil

import pytest
import torch
from conftest import LONGER, quick
from ranks import together
from test_resume import contents

from flowtilt import Trainer, UserError
from flowtilt.cli import main
from flowtilt.config import load_recipe
from flowtilt.io.files import read_lines
from flowtilt.methods import built_in
from flowtilt.methods.base import MOST_LAG
from flowtilt.plan.passes import passes_of
from flowtilt.runs import checkpoint
from flowtilt.runs.folder import open_run

SLOW = """
import time
class Slow:
    off_device = True
    seconds = SECONDS
    def __call__(self, images, prompts):
        time.sleep(self.seconds)
        return images[:, 0].mean((1, 2)) - images[:, 1].mean((1, 2))
"""


def lagging(folder, lag, *overrides, seconds=0.0):
    """A recipe with a reward elsewhere that takes its time, of prompts that depend on what was learnt."""
    file = folder.parent / f"slow{seconds}.py"
    file.write_text(SLOW.replace("SECONDS", str(seconds)))
    own = [
        f"rewards.far={file}:Slow",
        'evaluate.rewards=["light","playground_strict"]',
        "evaluate.every=1",
        "evaluate.samples=1",
        'tags="auto"',
    ]
    return quick(folder, *LONGER, *own, f"rollout.lag={lag}", *overrides)


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    """Runs of four rollouts with lag 1 and 2, and their policies "old" after each rollout."""
    place, found = tmp_path_factory.mktemp("lag"), {}
    for lag in (1, 2):
        trainer = Trainer(lagging(place / f"lag{lag}", lag))
        olds = [trainer.policy.state("old")]
        for _ in trainer:
            olds.append(trainer.policy.state("old"))
        found[lag] = trainer.run_folder, olds
    return found


@pytest.mark.parametrize("lag", [1, 2])
def test_each_rollout_is_sampled_and_trained_with_the_policy_of_so_many_rollouts_before(straight, tmp_path, monkeypatch, lag):
    run, olds = straight[lag]
    trainer = Trainer(lagging(tmp_path / "run", lag))
    method, policy, sampled_by, compared = trainer.method, trainer.policy, {}, {}
    begin, learn = method.rollouts.begin, method.learner.learn

    def sampling(step, prompts, phases, role):
        sampled_by[step] = policy.state(role)
        return begin(step, prompts, phases, role)

    def learning(step, rollout, phases):
        compared[step] = policy.state(policy._stand_ins["old"])
        return learn(step, rollout, phases)

    monkeypatch.setattr(method.rollouts, "begin", sampling)
    monkeypatch.setattr(method.learner, "learn", learning)
    trainer.run()
    for step in range(1, 5):
        wanted = olds[max(0, step - 1 - lag)]
        for found in (sampled_by[step], compared[step]):
            assert all(torch.equal(found[name], wanted[name]) for name in wanted), step
    assert contents(run) == contents(trainer.run_folder)
    spent = [line["network_evaluations"] for line in read_lines(run / "metrics.jsonl")]
    recipe = trainer.recipe
    assert spent == [sum(passes_of(recipe, step).evaluations for step in range(1, last + 1)) for last in range(1, 5)]


def test_a_run_that_is_resumed_after_every_rollout_ends_in_the_same_bits_though_its_judge_is_slow(straight, tmp_path):
    folder, lag = tmp_path / "run", 2
    # a run that ends early samples no further, and a longer one goes on as if it had
    Trainer(lagging(folder, lag, "rollouts=1", seconds=0.05)).run()
    for steps in (2, 4, 4):
        trainer = Trainer(open_run(folder, [f"rollouts={steps}"]), resume=folder)
        trainer.rollout()
        trainer.close()
    assert trainer.clock.step == 4
    assert contents(folder) == contents(straight[lag][0])


def test_the_checkpoint_has_the_policies_whose_images_are_under_way_and_no_more(straight):
    for lag in (1, 2):
        kept = checkpoint.newest(straight[lag][0])
        assert sorted(name for name in kept.tensors if name.startswith("old_")) == [f"old_{k}" for k in range(4 - lag, 4)]
        assert not list(straight[lag][0].glob("old_*"))


def test_two_processes_compute_what_one_does(straight, tmp_path):
    run, _ = straight[1]
    words = [f"{key}={json.dumps(value)}" for key, value in [("run", str(tmp_path / "two"))]]
    file = run / "recipe.toml"
    done = together(2, main, ["train", str(file), *words], folder=tmp_path / "ranks")
    assert done.codes == [0, 0], done.stderr[-2000:]
    for name in ("reward/total", "loss", "grad_norm", "deviation"):
        ours, theirs = ([line[name] for line in read_lines(folder / "metrics.jsonl")] for folder in (tmp_path / "two", run))
        assert ours == pytest.approx(theirs, rel=1e-3, abs=1e-7), name
    assert (
        read_lines(tmp_path / "two" / "metrics.jsonl")[-1]["network_evaluations"]
        == read_lines(run / "metrics.jsonl")[-1]["network_evaluations"]
    )
    shutil.rmtree(tmp_path / "two")


def test_every_method_says_which_lag_it_bears_and_is_refused_beyond_it():
    assert {name for name, method in built_in().items() if not method.most_lag} == {"ram", "acdmd", "dpo-offline", "mend"}
    assert all(method.most_lag <= MOST_LAG for method in built_in().values())
    with pytest.raises(UserError, match=r"rollout.lag: ram takes the images of the trained policy alone, not a lag of 1; lower it"):
        load_recipe("playground-ram", ["rollout.lag=1"])
    with pytest.raises(UserError, match=r"rollout.lag: rtdmd takes at most 1, not a lag of 2"):
        load_recipe("playground-rtdmd-rl", ["rollout.lag=2", "lora.on=[]", "objective.matching=0"])
    with pytest.raises(UserError, match=r"rollout.lag: nothing corrects"):
        load_recipe("playground-epg", ["rollout.lag=1", "objective.ratio=false"])


def test_grpo_trains_the_steps_that_an_older_policy_took_by_their_stored_densities(tmp_path):
    own = ["rollout.solver=euler", "objective.window_size=2", "objective.kl=0"]
    words = [word for word in own]
    recipe = load_recipe(
        "playground-grpo",
        [*words, "rollouts=3", "rollout.prompts=3", "rollout.images_per_prompt=4", "rollout.steps=4", "rollout.lag=1", "evaluate.every=0",
         "evaluate.images=8", "evaluate.steps=2", f"run={tmp_path}/grpo"],
    )  # fmt: skip
    Trainer(recipe).run()
    off = [line["ratio_off"] for line in read_lines(tmp_path / "grpo" / "metrics.jsonl")]
    assert off[1] > 0 and off[2] > 0
