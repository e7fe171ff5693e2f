"""`flowtilt plan`: passes and operations of a run, hours, and what a person reads."""

import argparse
import json
import re
import shutil
from pathlib import Path

import pytest
from conftest import quick

from flowtilt import Trainer, UserError, load_recipe
from flowtilt.cli import Parser, plan
from flowtilt.config import recipe_names
from flowtilt.plan import GPUS, Machine, make_plan
from flowtilt.plan.geometry import find_geometry
from flowtilt.plan.machine import REACHED
from flowtilt.plan.memory import GIB
from flowtilt.plan.meter import measure
from flowtilt.plan.passes import evaluations_in_all, passes_of
from flowtilt.plan.text import summary, table
from flowtilt.playground import pipeline_path


def typed(capsys, *words):
    """What a person reads who types `flowtilt plan …`."""
    top = Parser()
    plan.add(top.add_subparsers(dest="command", required=True))
    args: argparse.Namespace = top.parse_args(["plan", *words])
    assert args.call(args) == 0
    return capsys.readouterr().out


# a run --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "overrides",
    [
        (),
        ("objective.kl=0.1", "rollout.guidance=2.0", "rollout.solver=heun"),
        ('objective.old_policy="copy"', "objective.times_per_image=3", "optimizer.steps_per_rollout=5", "objective.kl=1e-4"),
        ('objective.old_policy="delayed"', 'rollout.solver="dpm2"', "rollout.steps=3", 'objective.times="rollout"'),
        ('objective.old_policy="copy"', "optimizer.steps_per_rollout=1", "model.recompute=true"),
        ("objective.type=ram", "objective.times_per_image=2"),
        ("objective.type=grpo", "objective.kl=0.1", "rollout.guidance=2.0", "rollout.solver=euler"),
        ("rollout.solver=cps", "rollout.guidance=2.0"),
        ("objective.type=awm", "objective.times_per_image=2", "objective.kl=0", "objective.norm_guard=0.1"),
    ],
    ids=lambda words: " ".join(words) or "as it is",
)
def test_network_evaluations_are_those_that_a_run_logs(tmp_path, overrides):
    recipe = quick(tmp_path / "run", "rollout.prompts=2", "rollout.images_per_prompt=3", *overrides)
    trainer = Trainer(recipe)
    logged = [trainer._step()["network_evaluations"] for _ in range(3)]
    planned = [passes_of(recipe, step).evaluations for step in (1, 2, 3)]
    assert logged == [sum(planned[: k + 1]) for k in range(3)]
    work = make_plan(recipe.model_copy(update={"rollouts": 3}), Machine()).work
    assert sum(effort.evaluations for name, effort in work.items() if name != "evaluate") == logged[-1]


def test_operations_are_those_of_a_real_run_on_a_cpu(unread, tmp_path):
    overrides = ["objective.kl=0.1", "objective.times_per_image=2", "optimizer.steps_per_rollout=1", "rollout.images_per_prompt=2"]
    recipe = quick(tmp_path / "run", "model.dtype=float32", "model.recompute=true", "micro_batch=12", "rollouts=2", *overrides)
    trainer = Trainer(recipe)
    steps = [measure(trainer._step) for _ in range(2)]
    found = make_plan(recipe, Machine())
    actual = {precision: sum(step.flops[precision] for step in steps) for precision in ("single", "tf32")}
    names = ("sample", "decode", "reward", "train")
    computed = {precision: sum(found.work[name].flops.get(precision, 0) for name in names) for precision in actual}
    captions, rest = divmod(actual["single"] - computed["single"], found.costs.encode.flops["single"])
    assert computed["tf32"] == actual["tf32"] and rest == 0 and 1 <= captions <= 12  # each new caption once


def test_evaluations_are_those_of_a_run(tmp_path, finished):
    recipe = load_recipe(finished / "recipe.toml")
    assert evaluations_in_all(recipe) == len((finished / "evaluations.jsonl").read_text().splitlines()) == 3
    assert evaluations_in_all(recipe.model_copy(update={"rollouts": 5})) == 4  # 0, 2, 4 and the last
    never = recipe.model_copy(update={"evaluate": recipe.evaluate.model_copy(update={"every": 0})})
    assert evaluations_in_all(never) == 2


# hours, the page ------------------------------------------------------------------------------------


def test_hours_are_linear_and_a_step_is_diffusionnfts():
    one, eight = (make_plan(load_recipe("sd35m-geneval"), Machine(gpus=gpus)) for gpus in (1, 8))
    assert one.hours == pytest.approx(8 * (eight.hours - eight.work["network"].hours))  # linear but for messages
    assert make_plan(load_recipe("sd35m-geneval"), Machine(utilisation=one.utilisation / 2)).hours == pytest.approx(2 * one.hours)
    # DiffusionNFT's step: 1152 images x (10 + 9 x (3 forwards and a backward)), about four fifths of it training
    forward = sum(one.costs.forward.each.flops.values())
    a_step = sum(sum(one.work[name].flops.values()) for name in ("sample", "train")) / one.recipe.rollouts
    assert 46 <= a_step / forward / 1152 <= 55
    assert 0.75 < sum(one.work["train"].flops.values()) / one.recipe.rollouts / a_step < 0.85


def test_hours_are_operations_at_the_peak_of_their_precision():
    machine = Machine("a100", gpus=2)
    gpu = GPUS["a100"]
    work = {"half": gpu.half * 1e12 * 3600, "tf32": gpu.tf32 * 1e12 * 3600, "single": gpu.single * 1e12 * 3600}
    assert machine.hours(work, 0.5) == pytest.approx(3)


def test_the_page_shows_what_the_command_printed():
    page = (Path(__file__).parent.parent / "docs" / "explain" / "plan.md").read_text(encoding="utf-8")
    shown = [block for block in re.findall(r"```text\n(.*?)```", page, re.S) if " on " in block.splitlines()[0]]
    assert len(shown) == 2
    for block in shown:
        ((name, gpus, gpu),) = re.findall(r"^(\S+) on (\d+) x (\S+) of", block)
        # the peak may move in the last digit with torch's version, work and micro-batches do not
        said = summary(make_plan(load_recipe(name), Machine(gpu, int(gpus)))).partition(", peak")[0]
        assert said in " ".join(block.split()), said


COUNTED = [name for name in recipe_names() if name.startswith("playground") or (name.startswith("sd35m") and "-rtdmd-" not in name)]
"""Other families are measured at small size in test_plan_families: a network of 20B takes minutes."""


@pytest.mark.parametrize("name", COUNTED)
def test_every_recipe_has_a_plan_of_at_most_110_columns(name):
    for machine in (Machine("4090"), Machine(gpus=8)):
        found = make_plan(load_recipe(name), machine)
        lines = table(found).splitlines()
        assert max(map(len, lines)) <= 110
        assert "computed, none is measured" in lines[0] and name in lines[0]
        json.dumps(found.as_json(), allow_nan=False)
        assert found.fits and "DOES NOT FIT" not in lines[-1]


def test_rewards_that_are_not_counted_are_named():
    recipe = load_recipe(
        "sd35m", ['rewards={ocr = 1.0, far = "http://host:1", mine = "a.py:f", unifiedreward = 1.0}', "evaluate.rewards=[]"]
    )
    found = make_plan(recipe, Machine())
    assert set(found.beside) == {"ocr", "far", "mine", "unifiedreward"} and found.work["reward"].flops == {}
    assert "per image and core" in found.beside["ocr"]


def test_the_playground_is_planned_for_a_gpu_only_where_one_is_named(capsys):
    said = typed(capsys, "playground", "rollouts=3")
    assert said.count("\n") == 1 and "needs no GPU" in said and "h100 at" not in said
    assert typed(capsys, "playground", "rollouts=3", "--gpu", "h100").startswith("playground on 1 x h100")


def test_the_command_prints_a_table_or_json(capsys):
    said = typed(capsys, "playground", "rollouts=3", "--gpus", "2", "--gpu", "4090")
    assert said.startswith("playground on 2 x 4090 of 24 GiB") and "playground: 3 rollouts of 18 x 8 images = " in said
    told = json.loads(typed(capsys, "playground", "--json", "--gpu-memory", "10"))
    assert told["figures"] == "computed, not measured" and told["machine"]["memory"] == 10 * GIB
    assert told["hours"] == pytest.approx(sum(part["hours"] for part in told["work"].values()))


def test_a_compiled_network_is_taken_to_reach_what_one_did_unless_the_user_knows_better(capsys):
    def utilisation(*words):
        return json.loads(typed(capsys, "playground", "--json", *words))["machine"]["utilisation"]

    assert [utilisation(), utilisation("model.compile=true")] == [REACHED[False], REACHED[True]]
    assert utilisation("model.compile=true", "--utilisation", "0.5") == 0.5


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["playground", "--gpu", "abacus"], "there are h100, h200, a100, l40s, 4090, 3090"),
        (["playground", "--gpus", "0"], "at least 1"),
        (["playground", "--gpu-memory", "0"], "--gpu-memory must be more than 0"),
        (["playground", "--gpu-memory", "nan"], "--gpu-memory must be more than 0"),
        (["playground", "--utilisation", "1.2"], "--utilisation must be above 0 and at most 1"),
        (["playground", "model=nobody/knows-this"], "give the folder, or download it first"),
        (["playground", "model=no/such/folder"], "neither a folder nor in the hub's cache"),
        (["playground", "model=."], "no model_index.json there"),
        (["sd35m", "model.resolution=100"], "not a multiple of 16"),
    ],
)
def test_a_mistake_is_one_line(capsys, tmp_path, monkeypatch, words, said):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError) as raised:
        typed(capsys, *words)
    assert said in str(raised.value) and "\n" not in str(raised.value)


def test_a_folder_that_is_another_pipeline_or_broken_is_refused(tmp_path):
    (tmp_path / "model_index.json").write_text('{"_class_name": "StableDiffusionPipeline"}')
    with pytest.raises(UserError, match="a StableDiffusionPipeline, whose network plan can't count"):
        find_geometry(str(tmp_path))
    (tmp_path / "model_index.json").write_text("{")
    with pytest.raises(UserError, match="not JSON"):
        find_geometry(str(tmp_path))
    (tmp_path / "model_index.json").write_text('{"_class_name": "StableDiffusion3Pipeline", "transformer": ["diffusers", "x"]}')
    with pytest.raises(UserError, match="can't be read"):
        find_geometry(str(tmp_path))


def test_a_pipeline_in_the_hubs_cache_is_read_from_there(tmp_path, monkeypatch):
    snapshot = tmp_path / "models--some--model" / "snapshots" / "abc"
    shutil.copytree(pipeline_path(), snapshot, ignore=shutil.ignore_patterns("*.safetensors"))
    refs = tmp_path / "models--some--model" / "refs"
    refs.mkdir()
    (refs / "main").write_text("abc")
    import huggingface_hub

    original = huggingface_hub.try_to_load_from_cache
    monkeypatch.setattr(huggingface_hub, "try_to_load_from_cache", lambda *args, **kwargs: original(*args, cache_dir=tmp_path, **kwargs))
    assert find_geometry("some/model").components == find_geometry("playground").components
    with pytest.raises(UserError, match="download it first"):
        find_geometry("some/model", revision="another")
