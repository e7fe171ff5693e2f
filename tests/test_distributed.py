"""Any number of processes computes what one computes, to fp32 rounding."""

import json
import os
import shutil
import sys
from functools import cache
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import LIGHT, QUICK, quick, two_blocks
from holders import held_by
from ranks import together
from test_trainer import rewards, weights

from flowtilt import Trainer, UserError
from flowtilt.cli import main
from flowtilt.distributed.world import World
from flowtilt.io.files import read_lines
from flowtilt.runs import checkpoint
from flowtilt.training.learner import shares
from flowtilt.training.timing import Phases


def launch(folder, processes, *overrides):
    return together(processes, main, ["train", "playground", *QUICK, f"run={folder}", *overrides], folder=folder.parent / "ranks")


def check_the_same(run, reference, steps):
    for name in ("grad_norm", "loss", "deviation", "images/diversity", "images/blank", "groups/identical_images"):
        ours, theirs = ([record[name] for record in read_lines(folder / "metrics.jsonl")[:steps]] for folder in (run, reference))
        assert ours == pytest.approx(theirs, rel=1e-4, abs=1e-12)
    assert rewards(run)[:steps] == pytest.approx(rewards(reference)[:steps], abs=1e-6)
    counts = [read_lines(folder / "metrics.jsonl")[steps - 1]["network_evaluations"] for folder in (run, reference)]
    assert counts[0] == counts[1]


@pytest.fixture(scope="module")
def launched(tmp_path_factory):
    """The folder of two rollouts, 3 prompts of 4 images each: over 2 ranks and over 4, groups are split between them."""

    @cache
    def run_of(processes):
        run = tmp_path_factory.mktemp("launched") / "run"
        done = launch(run, processes, "rollouts=2")
        assert done.codes == [0] * processes, done.stderr[-2000:]
        return run

    return run_of


@pytest.mark.parametrize("processes", [2, 4])
def test_one_and_several_processes_give_the_same_rewards_and_gradients(learnt, launched, processes):
    run = launched(processes)
    check_the_same(run, learnt, 2)
    evaluated = [read_lines(folder / "evaluations.jsonl")[1] for folder in (run, learnt)]
    assert evaluated[0]["score"] == evaluated[1]["score"] and evaluated[0]["by_tag"] == evaluated[1]["by_tag"]
    assert (run / "lora" / "pytorch_lora_weights.safetensors").is_file()
    for name, value in weights(run).items():
        assert torch.isfinite(value).all(), name


@pytest.mark.parametrize("processes", [1, 2])
def test_a_checkpoint_of_four_processes_goes_on_with_two_and_with_one(learnt, launched, tmp_path, processes):
    folder = shutil.copytree(launched(4), tmp_path / "run")
    done = together(processes, main, ["train", "--resume", str(folder), "rollouts=4"], folder=tmp_path / "ranks")
    assert done.codes == [0] * processes, done.stderr[-2000:]
    assert len(rewards(folder)) == 4
    check_the_same(folder, learnt, 4)


def test_two_processes_evaluate_what_one_does_and_count_no_prompt_twice(learnt, tmp_path):
    given = ["--lora", str(learnt), "--images", "70", "--steps", "2", "--rewards", "playground_strict,jpeg_incompressibility"]
    done = together(2, main, ["evaluate", *given, "-o", str(tmp_path / "two")], folder=tmp_path / "ranks")
    assert done.codes == [0, 0], done.stderr[-2000:]
    assert main(["evaluate", *given, "-o", str(tmp_path / "one")]) == 0
    two, one = (json.loads((tmp_path / name / "results.json").read_text()) for name in ("two", "one"))
    assert two["sets"] == one["sets"] and two["sets"]["playground"]["images"] == 70
    assert two["protocol"] == one["protocol"]


def test_two_processes_compare_the_pairs_that_one_does_though_a_prompts_images_are_split(tmp_path):
    own = [word for word in QUICK if not word.startswith("objective.")]
    words = ["train", "playground-dpo-online", *own, two_blocks(), *LIGHT, "rewards.playground=0"]
    assert main([*words, f"run={tmp_path}/one"]) == 0
    done = together(2, main, [*words, f"run={tmp_path}/two"], folder=tmp_path / "ranks")
    assert done.codes == [0, 0], done.stderr[-2000:]
    one, two = (read_lines(tmp_path / name / "metrics.jsonl") for name in ("one", "two"))
    for name in ("pairs", "loss", "margin", "winner_error", "kl", "grad_norm", "network_evaluations", "reward/total"):
        near = 1e-5 if name == "margin" else 1e-6  # it is a difference of errors near 1, a few of whose fp32 steps that is
        assert [record[name] for record in two] == pytest.approx([record[name] for record in one], rel=1e-3, abs=near), name
    assert one[0]["pairs"] > 0


COMPARING = {
    "crd": ["objective.type=crd", "objective.centring=0.5", "objective.beta=100", "objective.kl=0"],
    "dgpo": ["objective.type=dgpo", "objective.beta=1000"],
    "shared": ["objective.shared=both"],
}
"""Recipes that compare a prompt's images. In the first update nothing has moved yet; in the second a great beta gives the groups weight."""


def of_groups(folder):
    """The first rank's metrics of a rollout of each."""
    found = {}
    for name, overrides in COMPARING.items():
        with Trainer(quick(folder / name, *overrides, "objective.times_per_image=2", "seed=1")) as trainer:
            found[name] = trainer.method.step(1, Phases(torch.device("cpu")))
    if trainer.world.rank == 0:
        (folder / "found.json").write_text(json.dumps(found))
    return 0


def test_two_processes_compare_a_prompts_images_as_one_does_though_they_are_split(tmp_path):
    images: Any = SimpleNamespace(groups=torch.arange(12) // 4, kept=torch.ones(12, dtype=torch.bool))
    assert {5, 6} < set(shares(2, 1, 1, images, whole_groups=True)[1])  # of one prompt, on two ranks, in the second update
    of_groups(tmp_path / "one")
    done = together(2, of_groups, tmp_path / "two", folder=tmp_path / "ranks")
    assert done.codes == [0, 0], done.stderr[-2000:]
    one, two = (json.loads((tmp_path / size / "found.json").read_text()) for size in ("one", "two"))
    for name in COMPARING:
        for key in {"loss", "grad_norm", "implicit_reward", "preference"} & one[name].keys():
            assert two[name][key] == pytest.approx(one[name][key], rel=1e-4, abs=1e-12), (name, key)


@pytest.mark.parametrize("number", [0, 1, 5, 144])
@pytest.mark.parametrize("size", [1, 2, 4, 7])
def test_shares_cover_every_row_once_and_differ_by_one_at_most(number, size):
    shares = [World(rank, size, torch.device("cpu")).share(number) for rank in range(size)]
    assert [k for share in shares for k in share] == list(range(number))
    assert max(map(len, shares)) - min(map(len, shares)) <= 1


def test_an_error_of_the_user_ends_all_processes(tmp_path):
    done = launch(tmp_path / "run", 2, "prompts=nowhere.txt")
    assert done.codes == [2, 2] and done.stderr.count("flowtilt: ") == 1 and ": prompts nowhere.txt" in done.stderr
    assert not (tmp_path / "run").exists()


def of_rank(words, own):
    """The command with words of one rank's own."""
    return main([*words, *own[int(os.environ["RANK"])]])


@pytest.mark.parametrize(
    ("own", "said"),
    [
        ([["seed=1"], ["seed=2", "optimizer.lr=1e-9"]], "rank 1 has optimizer.lr = 1e-09, rank 0 has 0.003 (and seed)"),
        ([["prompts={}/a.txt"], ["prompts={}/b.txt"]], 'b.txt", rank 0 has '),
        ([[], ["--resume", "elsewhere"]], "not a run"),
    ],
)
def test_ranks_that_would_compute_different_things_are_refused_in_one_line(tmp_path, own, said):
    for name in "ab":
        (tmp_path / f"{name}.txt").write_text("a red circle\na blue square\na cross\n")
    own = [[word.format(tmp_path) for word in words] for words in own]
    words = ["train", "playground", *QUICK, f"run={tmp_path}/run"]
    done = together(2, of_rank, words, own, folder=tmp_path / "ranks", within=60)
    assert done.codes == [2, 2]
    assert done.stderr.count("flowtilt: ") == 1 and said in done.stderr, done.stderr[-3000:]
    assert not (tmp_path / "run").exists()


def of_place(place):
    """Trains from a folder of its own, where the same name is another file."""
    os.chdir(place[int(os.environ["RANK"])])
    return main(["train", "playground", *QUICK, "prompts=p.txt", "run=run", "rewards.playground=0", "rewards.jpeg_incompressibility=1"])


def test_ranks_whose_prompt_files_differ_are_refused(tmp_path):
    for name, text in (("a", "a red circle"), ("b", "a red square")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "p.txt").write_text(f"{text}\na blue square\na cross\n")
    done = together(2, of_place, [tmp_path / "a", tmp_path / "b"], folder=tmp_path / "ranks", within=60)
    assert done.codes == [2, 2] and done.stderr.count("flowtilt: ") == 1, done.stderr[-3000:]
    assert "rank 1 has " in done.stderr and "prompts" in done.stderr


def test_ranks_that_would_evaluate_different_things_are_refused(tmp_path):
    words = ["evaluate", "--images", "4", "--steps", "2", "-o", str(tmp_path / "out")]
    done = together(2, of_rank, words, [["--seed", "1"], ["--seed", "2"]], folder=tmp_path / "ranks", within=60)
    assert done.codes == [2, 2] and done.stderr.count("flowtilt: ") == 1, done.stderr[-3000:]
    assert "rank 1 has seed = 2, rank 0 has 1" in done.stderr and not (tmp_path / "out").exists()


def test_a_detail_that_only_one_rank_has_holds_up_nobody(tmp_path):
    (tmp_path / "mine.py").write_text(
        "import os\nfrom flowtilt import RewardOutput\n"
        "def f(images, prompts):\n"
        "    red = {'red': images[:, 0].mean((1, 2))} if os.environ['RANK'] == '1' else {}\n"
        "    return RewardOutput(images.mean((1, 2, 3)), details=red)\n"
    )
    done = launch(tmp_path / "run", 2, f"rewards.mine={tmp_path}/mine.py:f", "rollouts=1", 'evaluate.rewards=["playground"]')
    assert done.codes == [0, 0], done.stderr[-2000:]
    record = read_lines(tmp_path / "run" / "metrics.jsonl")[0]
    assert 0 < record["reward/mine/red"] < 1 and record["missing/mine"] == 0


def test_a_refusal_of_the_first_rank_is_every_ranks(tmp_path):
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "thesis.tex").touch()
    words = ["evaluate", "--images", "4", "--steps", "2", "-o", str(tmp_path / "taken")]
    done = together(2, main, words, folder=tmp_path / "ranks")
    assert done.codes == [2, 2] and done.stderr.count("flowtilt: ") == 1 and "Connection" not in done.stderr
    assert "not empty and no evaluation" in done.stderr


def test_ranks_end_together_where_another_process_holds_their_run(launched, tmp_path):
    folder = shutil.copytree(launched(2), tmp_path / "run")
    with held_by("a training run", folder) as pid:
        done = together(2, main, ["train", "--resume", str(folder), "rollouts=3"], folder=tmp_path / "ranks")
    assert done.codes == [2, 2] and done.stderr.count("flowtilt:") == 1 and f"process {pid} on" in done.stderr
    assert len(read_lines(folder / "metrics.jsonl")) == 2


def test_ranks_all_take_the_checkpoint_before_a_damaged_one(launched, tmp_path):
    folder = shutil.copytree(launched(2), tmp_path / "run")
    (folder / "checkpoints" / "step-000002" / "old.safetensors").write_bytes(b"half")
    done = together(2, main, ["train", "--resume", str(folder)], folder=tmp_path / "ranks")
    assert done.codes == [0, 0], done.stderr[-2000:]
    assert (folder / "checkpoints" / "step-000002.damaged").is_dir()
    assert rewards(folder) == rewards(launched(2))


def of_library(run):
    """A script that iterates over rollouts; 0 where each rank saw all of them and only the first was called back, 3 where that fails."""
    seen: list[float] = []
    trainer = Trainer(quick(run, "rollouts=2"), on_rollout=lambda metrics, preview: seen.append(metrics["rollout"]))
    steps = [metrics["rollout"] for metrics in trainer]
    assert steps == [1, 2] and seen == ([] if trainer.world.rank else steps)

    def fail(metrics, preview):
        raise ZeroDivisionError("one over nothing")

    try:
        Trainer(resume=run, rollouts=4, on_rollout=fail).run()
    except (ZeroDivisionError, UserError) as error:
        print(type(error).__name__, error, file=sys.stderr)
        return 3
    return 0


def test_a_trainer_is_iterated_over_and_calls_back_on_the_first_of_two_processes_whose_error_ends_both(tmp_path):
    done = together(2, of_library, tmp_path / "run", folder=tmp_path / "ranks")
    assert done.codes == [3, 3], done.stderr[-2000:]
    assert done.errors[0].splitlines()[-1] == "ZeroDivisionError one over nothing"
    assert "UserError rank 0: on_rollout failed: ZeroDivisionError: one over nothing, at " in done.errors[1].splitlines()[-1]
    assert len(rewards(tmp_path / "run")) == checkpoint.newest(tmp_path / "run").step == 3
