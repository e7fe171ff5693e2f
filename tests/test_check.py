"""`flowtilt check`: every step passes where all is well, for every kind of recipe, and each failure is one line that says what to do."""

import json

import pytest
import tiny_pipelines
import torch
from conftest import LIGHT, two_blocks
from few_steps import cold, rl
from hub_stand_in import serving
from PIL import Image

from flowtilt.check import Checklist, check, here, hours
from flowtilt.check import trial as trials
from flowtilt.check.trial import small
from flowtilt.cli import main
from flowtilt.config import Recipe, load_recipe
from flowtilt.errors import UserError
from flowtilt.io import published

CPU = torch.device("cpu")
STEPS = ("packages", "machine", "disk", "model", "reward files", "prompts", "load rewards", "load model", "sample", "score", "train")


def tried(recipe: Recipe, price: float | None = None) -> tuple[dict[str, tuple[str, str]], list[str]]:
    """Status and text of each line by its step's name, and the steps that failed."""
    lines: list[str] = []
    failed = check(recipe, lines.append, price)
    parts = [(line[:8].strip(), *line[8:].split(": ", 1)) for line in lines]
    return {name: (status, text) for status, name, text in parts}, failed


def ready(found, failed):
    assert not failed, {name: found[name] for name in failed}
    assert all(found[name][0] == "ok" for name in (*STEPS, "LoRA in diffusers", "time")), found


@pytest.fixture
def quick_recipe(tmp_path):
    def made(*overrides, base="playground"):
        return load_recipe(base, [two_blocks(), *LIGHT, "evaluate.steps=2", "rollout.steps=3", f"run={tmp_path}/run", *overrides])

    return made


# every kind of recipe -------------------------------------------------------------------------------------


def test_a_recipe_that_runs_is_ready_and_leaves_nothing(quick_recipe, tmp_path):
    found, failed = tried(quick_recipe("objective.times_per_image=2"), price=2.0)
    ready(found, failed)
    assert "stock diffusers draws the same image" in found["LoRA in diffusers"][1]
    assert "at 2 per hour" in found["time"][1] and found["memory"][0] == "note"
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("base", ["playground-grpo", "playground-dpo-online", "playground-awr"])
def test_other_methods_on_rollouts(quick_recipe, base):
    ready(*tried(quick_recipe(base=base)))


def test_offline_dpo_reads_two_of_its_pairs(quick_recipe, tmp_path):
    for name in ("a", "b"):
        Image.new("RGB", (32, 32), "red" if name == "a" else "blue").save(tmp_path / f"{name}.png")
    row = {"prompt": "a red circle", "chosen": "a.png", "rejected": "b.png"}
    (tmp_path / "pairs.jsonl").write_text("\n".join(json.dumps(row | {"prompt": f"a red circle {k}"}) for k in range(3)))
    recipe = load_recipe(
        "playground-dpo", [two_blocks(), "evaluate.steps=2", f"objective.pairs={tmp_path}/pairs.jsonl", f"run={tmp_path}/run"]
    )
    ready(*tried(recipe))


def test_distillation_and_its_second_stage(distilled, tmp_path):
    ready(*tried(cold(tmp_path / "cold")))
    found, failed = tried(rl(tmp_path / "rl", distilled))
    ready(found, failed)
    assert found["LoRAs"][0] == "ok"
    found, failed = tried(rl(tmp_path / "rl", tmp_path / "gone"))
    assert failed == ["LoRAs"] and "no such file or folder" in found["LoRAs"][1] and found["load model"] == ("skipped", "needs LoRAs")


def test_all_weights(quick_recipe):
    ready(*tried(load_recipe("playground", [two_blocks(), *LIGHT, "train=full", "evaluate.steps=2", "rollout.steps=3", "optimizer.lr=1e-5",
                                           "objective.times_per_image=2"])))  # fmt: skip


def test_a_small_pipeline_of_sd35s_class_in_half_precision_on_published_levels(quick_recipe, tmp_path):
    folder = tiny_pipelines.sd35(tmp_path)
    found, failed = tried(
        quick_recipe(
            f"model.path={folder}",
            "model.dtype=bfloat16",
            "model.t5_length=20",
            "model.levels=stock",
            "model.resolution=32",
            "objective.times_per_image=2",
        )
    )
    ready(found, failed)
    assert "bfloat16" in found["load model"][1]


# each step made to fail -----------------------------------------------------------------------------------


def fails(recipe, step, *words):
    found, failed = tried(recipe)
    assert failed == [step] and found[step][0] == "FAILED", found
    assert all(word in found[step][1] for word in words), found[step]
    return found


def test_an_old_package(quick_recipe, monkeypatch):
    monkeypatch.setattr(here, "floors", lambda: {"transformers": "99.1"})
    monkeypatch.setattr(trials.Trial, "load_model", _refused)
    found, failed = tried(quick_recipe())
    assert failed[0] == "packages" and "pip install 'transformers>=99.1'" in found["packages"][1]


def _refused(self):
    raise UserError("not now")


@pytest.fixture
def no_trial(monkeypatch):
    """What follows the files is not tried."""
    for name in ("load_rewards", "load_model"):
        monkeypatch.setattr(trials.Trial, name, lambda self: "")
    for name in ("sample", "score", "train", "round_trip"):
        monkeypatch.setattr(trials.Trial, name, lambda self: "")
    monkeypatch.setattr(hours, "hours_of", lambda *_: 1.0)


def test_a_full_disk_and_a_folder_that_cannot_be_written(quick_recipe, no_trial, monkeypatch):
    monkeypatch.setattr(here, "ROOM", 1e18)
    fails(quick_recipe(), "disk", "free", "set run to another disk")
    monkeypatch.setattr(here.os, "access", lambda *_: False)
    fails(quick_recipe(), "disk", "can't be written; set run")


def test_a_model_that_is_nowhere(quick_recipe, no_trial):
    found = fails(quick_recipe("model.path=./nowhere"), "model", "no such folder")
    assert found["load model"] == ("skipped", "needs model")


def test_a_model_on_the_hub_says_how_large_its_download_is_and_whether_its_licence_is_accepted(quick_recipe, no_trial, tmp_path):
    folder = tiny_pipelines.sd35(tmp_path / "published")
    with serving(tmp_path) as hub:
        hub.repositories["owner/tiny"] = folder
        recipe = quick_recipe("model.path=owner/tiny")
        fails(recipe, "model", "MB in", "files to download; type `flowtilt download owner/tiny`")
        hub.gated.add("owner/tiny")
        fails(recipe, "model", "its licence is accepted", "to download")
        hub.refused.add("owner/tiny")
        fails(recipe, "model", "is gated: accept its licence at https://huggingface.co/owner/tiny")
        hub.refused.clear()
        main(["download", "owner/tiny"])
        found, failed = tried(recipe)
        assert not failed and "its licence is accepted" in found["model"][1]
    fails(quick_recipe("model.path=owner/gone"), "model", "owner/gone")


def test_rewards_whose_weights_are_not_here(quick_recipe, no_trial, tmp_path, monkeypatch):
    monkeypatch.setenv("FLOWTILT_WEIGHTS", str(tmp_path / "weights"))
    monkeypatch.setattr(published.hub, "look_up", _unreachable)
    found = fails(
        quick_recipe("rewards.hpsv2=1", "rewards.aesthetic=1"),
        "reward files",
        "hpsv2: at least 2.0 GB to download; type",
    )
    assert "aesthetic: at least 3.7 MB" in found["reward files"][1] and found["load rewards"] == ("skipped", "needs reward files")


def _unreachable(*_):
    raise OSError("no network")


def test_prompts_that_are_not_there(quick_recipe, no_trial):
    found = fails(quick_recipe("prompts=./gone.txt"), "prompts", "gone.txt")
    assert found["load model"][0] == "ok" and found["sample"] == ("skipped", "needs prompts")


def test_a_reward_that_fails(quick_recipe, no_trial, tmp_path, monkeypatch):
    (tmp_path / "mine.py").write_text("raise ImportError('no such thing')")
    monkeypatch.undo()
    found, failed = tried(quick_recipe(f"rewards.mine={tmp_path}/mine.py:f"))
    assert failed == ["load rewards"] and "no such thing" in found["load rewards"][1]
    assert found["score"][0] == found["train"][0] == "skipped" and found["sample"][0] == "ok"


@pytest.fixture
def loaded(quick_recipe):
    """A trial whose parts are loaded."""
    from flowtilt.distributed import world

    recipe = quick_recipe("objective.times_per_image=2")
    train, test, _ = here.prompts(recipe)
    made = trials.Trial(recipe, world.start(), train, test)
    made.load_rewards()
    made.load_model()
    return made


def test_images_that_are_broken_scores_that_are_missing_and_gradients_that_vanish(loaded, monkeypatch):
    monkeypatch.setattr(trials, "generate", lambda *_: torch.full((2, 3, 32, 32), torch.nan))
    with pytest.raises(UserError, match=r"an image is not finite; set model\.dtype"):
        loaded.sample()
    monkeypatch.setattr(trials, "generate", lambda *_: torch.ones(2, 3, 32, 32))
    with pytest.raises(UserError, match="one flat colour"):
        loaded.sample()
    loaded._eval_rewards = {"mute": lambda images, prompts: torch.full((len(images),), torch.nan)}
    with pytest.raises(UserError, match="reward mute: no score for either image"):
        loaded.score()
    from flowtilt.training.optimizer import RoleOptimizer

    monkeypatch.setattr(RoleOptimizer, "step", lambda *_: 0.0)
    with pytest.raises(UserError, match="the gradient is 0, so nothing would be trained"):
        loaded.train()


def test_a_lora_that_draws_something_else_in_diffusers(loaded, monkeypatch):
    from flowtilt.check import round_trip

    monkeypatch.setattr(round_trip, "stock_images", lambda *_, **__: torch.zeros(1, 3, 32, 32))
    with pytest.raises(UserError, match="stock diffusers draws another image"):
        loaded.round_trip()


def test_memory_that_ends_and_errors_of_libraries_are_one_line():
    lines: list[str] = []
    found = Checklist(lines.append)

    def full() -> str:
        raise torch.OutOfMemoryError("CUDA out of memory")

    assert not found.step("train", full) and not found.step("sample", lambda: str(1 / 0)) and not found.step("time", str, ["train"])
    assert "set model.offload=true" in lines[0] and "ZeroDivisionError" in lines[1] and lines[2] == "skipped time: needs train"
    assert found.failed == ["train", "sample"]


def test_a_plan_that_does_not_fit_says_what_to_lower():
    from flowtilt.plan import Machine, make_plan

    plan = make_plan(load_recipe("sd35m-pickscore"), Machine("4090", memory=3.0))
    with pytest.raises(UserError, match=r"the plan needs .* of 3\.0 GiB.*lower model\.resolution"):
        here.memory(plan)


# the small step and the hours -----------------------------------------------------------------------------


def test_the_small_step_keeps_the_recipe_but_for_its_size(quick_recipe):
    recipe = quick_recipe("rollout.train_per_prompt=8", "rollout.images_per_prompt=12")
    few = small(recipe)
    assert (few.rollout.images(), few.rollout.trained(), few.optimizer.steps_per_rollout) == (8, 8, 1)
    assert few.objective == recipe.objective and few.rollout.steps == recipe.rollout.steps
    assert few.reward_table()[trials.SPREAD].weight == 1 and trials.SPREAD not in recipe.rewards


def test_hours_are_those_of_all_images_and_evaluations(quick_recipe):
    recipe = quick_recipe("rollouts=10", "rollout.prompts=4", "rollout.images_per_prompt=8", "evaluate.every=5", "evaluate.images=100")
    seconds = {"sample": 8.0, "reward": 0.8, "train": 16.0, "evaluate": 2.0, "judge": 0.5, "visit": 0.0}
    assert hours.hours_of(recipe, small(recipe), seconds) == pytest.approx((10 * 4 * 24.8 + 3 * 100 * 2.5) / 3600)
    assert hours.visit_apart(3 + 2 * 0.5, 3 + 10 * 0.5, 2, 10) == (0.5, 3.0) and hours.visit_apart(4.0, 3.0, 2, 10) == (0.0, 4.0)
    # text encoders and reward models that come only while they work come once a rollout and once an evaluation
    visiting = seconds | {"encode": 3.0, "reward": 2.8, "visit": 2.0}
    assert hours.hours_of(recipe, small(recipe), visiting) == pytest.approx((10 * (5 + 4 * 24.8) + 3 * (5 + 100 * 2.5)) / 3600)
    assert hours.said(20.0, 18.0, 0.5) == "about 20 h for the whole run, by a few images; `flowtilt plan` says 18 h; 10.00 at 0.5 per hour"


# the command ----------------------------------------------------------------------------------------------


def test_the_command_and_the_dry_run_say_ready_or_not(monkeypatch, capsys):
    monkeypatch.setattr("flowtilt.check.check", lambda recipe, say, price: say("ok      all: well") or [])
    assert main(["check", "playground", "rollouts=3"]) == 0
    assert capsys.readouterr().out == "ok      all: well\nready: flowtilt train playground rollouts=3\n"
    monkeypatch.setattr("flowtilt.check.check", lambda recipe, say, price: ["model", "disk"])
    assert main(["train", "playground", "--dry-run"]) == 2
    assert capsys.readouterr().out == "not ready: model, disk; the same command tries again\n"
    for words in (["train", "--dry-run", "--resume", "x"], ["check", "playground", "--price", "-1"], ["check", "nothing"]):
        assert main(words) == 2
