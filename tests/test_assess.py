"""`flowtilt evaluate`: the run's own numbers again, whatever the batch, the order or the interruptions."""

import json

import pytest
import torch
from conftest import quick
from holders import held_by

from flowtilt import Trainer, UserError
from flowtilt.config import load_recipe
from flowtilt.evaluate import each, spread
from flowtilt.evaluate.assess import assess
from flowtilt.io.files import read_lines
from flowtilt.playground import world
from flowtilt.prompts import Prompt

FEW = {"images": 24, "steps": 3}

STOPS = """
from pathlib import Path
calls = 0
def reward(images, prompts):
    global calls
    calls += 1
    if (Path(__file__).parent / f"stop-{calls}").exists():
        raise RuntimeError("the judge fell asleep")
    return images.mean((1, 2, 3))
"""


def scores(folder):
    return {(r["set"], r["variant"], r["prompt"], r["copy"]): r["scores"] for r in read_lines(folder / "scores.jsonl")}


def texts(folder, name, *lines):
    path = folder / name
    path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    return str(path)


PROMPTS = [prompt.text for prompt in world.prompts("test")[:6]]


def test_a_runs_lora_scores_what_the_run_itself_said(learnt, tmp_path):
    """Same images, same code: equal, not close."""
    results = assess(tmp_path / "e", loras=[learnt])
    said = read_lines(learnt / "evaluations.jsonl")[-1]
    found = results["sets"]["playground"]["columns"]["playground_strict"]["tuned"]
    assert found == said["estimate"] and found["mean"] == said["score"] and found["images"] == said["images"]
    assert {tag: one["mean"] for tag, one in found["by_tag"].items()} == pytest.approx(said["by_tag"], abs=1e-12)
    recipe = load_recipe(learnt / "recipe.toml")
    protocol = results["protocol"]
    assert protocol["steps"] == recipe.evaluate.steps and protocol["seed"] == recipe.seed and protocol["t5_length"] == 1
    assert len(protocol["lora"][0]["sha256"]) == 64 and protocol["model_files"]


def test_an_image_depends_on_its_prompt_and_copy_alone(tmp_path):
    whole = texts(tmp_path, "whole.txt", *PROMPTS)
    part = texts(tmp_path, "part.txt", PROMPTS[4], PROMPTS[1])
    assess(tmp_path / "a", prompts=[whole], rewards=["jpeg_incompressibility"], images_per_prompt=2, steps=3, seed=0)
    assess(tmp_path / "b", prompts=[part], rewards=["jpeg_incompressibility"], images_per_prompt=3, steps=3, seed=0, micro_batch=2)
    a = {key[2:]: value for key, value in scores(tmp_path / "a").items()}
    b = {key[2:]: value for key, value in scores(tmp_path / "b").items()}
    shared = set(a) & set(b)
    assert shared == {(PROMPTS[k], copy) for k in (1, 4) for copy in (0, 1)}
    assert all(a[key] == b[key] for key in shared)
    assert len({value["jpeg_incompressibility"] for value in b.values()}) > 3  # and copies differ


def test_an_interrupted_evaluation_goes_on_and_ends_as_the_unbroken_one(tmp_path, monkeypatch):
    monkeypatch.setattr("flowtilt.evaluate.folder.BLOCK", 4)
    (tmp_path / "judge.py").write_text(STOPS)
    given = {
        "prompts": [texts(tmp_path, "p.txt", *PROMPTS)],
        "images_per_prompt": 4,
        "steps": 2,
        "rewards": [f"{tmp_path}/judge.py:reward"],
    }
    (tmp_path / "stop-4").touch()
    with pytest.raises(UserError, match="the judge fell asleep"):
        assess(tmp_path / "broken", **given)
    assert not (tmp_path / "broken" / "results.json").exists()
    assert len(read_lines(tmp_path / "broken" / "scores-0.jsonl")) == 12
    with (tmp_path / "broken" / "scores-0.jsonl").open("a") as file:
        file.write('{"set": "p", "torn')  # what a kill in the midst of a line leaves
    (tmp_path / "stop-4").unlink()
    found = assess(tmp_path / "broken", **given)
    whole = assess(tmp_path / "whole", **given)
    assert found["sets"] == whole["sets"] and found["sets"]["p"]["images"] == 24
    assert scores(tmp_path / "broken") == scores(tmp_path / "whole")
    assert (tmp_path / "broken" / "report.html").exists()


def test_what_is_done_is_not_drawn_again(tmp_path):
    (tmp_path / "judge.py").write_text(STOPS)
    given = {"prompts": [texts(tmp_path, "p.txt", *PROMPTS)], "rewards": [f"{tmp_path}/judge.py:reward"], "steps": 2}
    first = assess(tmp_path / "e", **given)
    (tmp_path / "stop-1").touch()
    assert assess(tmp_path / "e", **given)["sets"] == first["sets"]


@pytest.mark.parametrize("changed", ["judge.py", "p.jsonl"])
def test_a_changed_judge_or_prompt_is_another_protocol(tmp_path, changed):
    """Else the scores of the old one would come back under the new one's name."""
    (tmp_path / "judge.py").write_text(STOPS)
    (tmp_path / "p.jsonl").write_text(json.dumps({"prompt": PROMPTS[0], "include": [1]}))
    given = {"prompts": [f"{tmp_path}/p.jsonl"], "rewards": [f"{tmp_path}/judge.py:reward"], "steps": 2}
    assess(tmp_path / "e", **given)
    text = (tmp_path / changed).read_text()
    (tmp_path / changed).write_text(text.replace("[1]", "[2]").replace("mean", "amax"))
    with pytest.raises(UserError, match=r"whose (prompts|rewards) differ"):
        assess(tmp_path / "e", **given)


def test_two_evaluations_do_not_work_in_one_folder(tmp_path):
    assess(tmp_path / "e", **FEW)
    with held_by("an evaluation", tmp_path / "e"), pytest.raises(UserError, match="held by an evaluation, process"):
        assess(tmp_path / "e", **FEW)


def test_a_damaged_protocol_says_so(tmp_path):
    assess(tmp_path / "e", **FEW)
    (tmp_path / "e" / "protocol.json").write_text('{"model": ')
    with pytest.raises(UserError, match=r"protocol\.json: damaged"):
        assess(tmp_path / "e", **FEW)


def test_two_sets_of_one_name_are_refused(tmp_path):
    (tmp_path / "a").mkdir()
    files = [texts(tmp_path, "t.txt", "x"), texts(tmp_path / "a", "t.txt", "y")]
    with pytest.raises(UserError, match="two sets of prompts are called t"):
        assess(tmp_path / "e", prompts=files, rewards=["jpeg_incompressibility"])


def test_a_run_of_half_precision_and_its_own_rewards_scores_what_it_said(tmp_path):
    """LoRA weights stay fp32 beside a bfloat16 network; options, sources and details come from the run's recipe."""
    (tmp_path / "mine.py").write_text(
        "from flowtilt import RewardOutput\n"
        "class Mine:\n"
        "    def __init__(self, *, device, scale=1.0):\n        self.scale = scale\n"
        "    def __call__(self, images, prompts):\n"
        "        return RewardOutput(images.mean((1, 2, 3)), details={'red': self.scale * images[:, 0].mean((1, 2))})\n"
    )
    mine = f'rewards.mine={{source="{tmp_path}/mine.py:Mine", options={{scale=3.0}}}}'
    judged = ["rewards.playground=0", 'evaluate.rewards=["mine/red"]', "rollouts=2", "optimizer.lr=0.03"]
    judged += ["rollout.prompts=2", "rollout.images_per_prompt=2", "rollout.steps=2", "objective.times_per_image=1"]
    Trainer(quick(tmp_path / "run", "model.dtype=bfloat16", mine, *judged)).run()
    said = read_lines(tmp_path / "run" / "evaluations.jsonl")[-1]
    assert said["column"] == "mine/red"
    found = assess(tmp_path / "e", loras=[tmp_path / "run"])["sets"]["playground"]["columns"]
    assert found["mine/red"]["tuned"]["mean"] == pytest.approx(said["score"], rel=1e-12)
    assert found["mine/red"]["tuned"]["mean"] != pytest.approx(read_lines(tmp_path / "run" / "evaluations.jsonl")[0]["score"], rel=1e-6)


def test_another_protocol_does_not_go_into_the_same_folder(tmp_path):
    assess(tmp_path / "e", **FEW)
    with pytest.raises(UserError, match="whose steps, seed differ; choose another folder with -o"):
        assess(tmp_path / "e", images=24, steps=4, seed=7)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.tex").touch()
    with pytest.raises(UserError, match="not empty and no evaluation"):
        assess(tmp_path / "other", **FEW)


def test_a_comparison_pairs_the_same_noise(learnt, tmp_path):
    results = assess(tmp_path / "both", loras=[learnt], rewards=["jpeg_incompressibility"], compare_base=True, **FEW)
    alone = assess(tmp_path / "base", rewards=["jpeg_incompressibility"], **FEW)
    both = results["sets"]["playground"]["columns"]["jpeg_incompressibility"]
    assert both["base"] == alone["sets"]["playground"]["columns"]["jpeg_incompressibility"]["base"]
    assert both["difference"]["mean"] == pytest.approx(both["tuned"]["mean"] - both["base"]["mean"], abs=1e-9)


def test_a_reward_that_judges_none_of_a_set_is_left_out_of_it_and_said(tmp_path):
    quoted = texts(tmp_path, "signs.txt", 'a sign that says "HI"')
    said = []
    results = assess(
        tmp_path / "e", prompts=["playground", quoted], rewards=["ocr", "jpeg_incompressibility"], images=6, steps=2, say=said.append
    )
    assert list(results["sets"]["playground"]["columns"]) == ["jpeg_incompressibility"]
    assert next(iter(results["sets"]["signs"]["columns"])) == "ocr"
    assert [(line["set"], line["reward"]) for line in results["left_out"]] == [("playground", "ocr")]
    assert len(said) == 1 and said[0].startswith("left out: ocr for playground")


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"rewards": ["pikscore"]}, "no reward 'pikscore'; did you mean 'pickscore'"),
        ({"rewards": ["ocr"]}, "none of the rewards can judge playground"),
        ({"rewards": ["clipscore"]}, "clip-l is missing: `flowtilt download clipscore`"),
        ({"prompts": ["gneval"], "rewards": ["ocr"]}, "no such set (did you mean 'geneval'?)"),
        ({"model": "/nowhere/at/all", "rewards": ["jpeg_incompressibility"], "prompts": ["playground"]}, "no such folder"),
        ({"model": "/nowhere/at/all"}, "--prompts and --rewards must be named"),
        ({"compare_base": True}, "needs a --lora"),
    ],
)
def test_bad_input_is_one_line_and_makes_no_folder(tmp_path, monkeypatch, given, said):
    monkeypatch.setenv("FLOWTILT_WEIGHTS", str(tmp_path / "none"))
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    with pytest.raises(UserError) as caught:
        assess(tmp_path / "e", **given)
    assert said in str(caught.value) and "\n" not in str(caught.value)
    assert not (tmp_path / "e").exists()


def kept(folder):
    return {file.name: file.read_bytes() for file in (folder / "images" / "playground" / "base").glob("*.png")}


def test_full_size_images_are_kept_on_request(tmp_path):
    assess(tmp_path / "e", save_images=True, **FEW)
    assert len(kept(tmp_path / "e")) == 24
    assert len(json.loads((tmp_path / "e" / "results.json").read_text())["protocol"]["model_files"]) >= 4


def test_images_that_were_not_kept_are_drawn_again_and_not_judged_again(tmp_path, monkeypatch):
    monkeypatch.setattr("flowtilt.evaluate.folder.BLOCK", 8)
    (tmp_path / "judge.py").write_text(STOPS)
    given = FEW | {"rewards": [f"{tmp_path}/judge.py:reward"]}
    whole = assess(tmp_path / "whole", save_images=True, **given)
    assert len(kept(tmp_path / "whole")) == 24
    assess(tmp_path / "late", **given)
    (tmp_path / "stop-1").touch()  # whoever judges now fails
    assert assess(tmp_path / "late", save_images=True, **given)["sets"] == whole["sets"]
    assert kept(tmp_path / "late") == kept(tmp_path / "whole")
    lost = tmp_path / "late" / "images" / "playground" / "base" / "00000-00.png"
    lost.unlink()
    assess(tmp_path / "late", save_images=True, **given)
    assert kept(tmp_path / "late") == kept(tmp_path / "whole") and len(scores(tmp_path / "late")) == 24


def test_an_interrupted_evaluation_that_goes_on_with_its_images_has_all_of_them(tmp_path, monkeypatch):
    monkeypatch.setattr("flowtilt.evaluate.folder.BLOCK", 8)
    (tmp_path / "judge.py").write_text(STOPS)
    (tmp_path / "stop-3").touch()
    given = FEW | {"rewards": [f"{tmp_path}/judge.py:reward"]}
    with pytest.raises(UserError, match="the judge fell asleep"):
        assess(tmp_path / "e", **given)
    (tmp_path / "stop-3").unlink()
    assess(tmp_path / "e", save_images=True, **given)
    assert len(kept(tmp_path / "e")) == 24


# which images ----------------------------------------------------------------------------------------


def test_every_prompt_is_counted_equally_and_none_twice():
    prompts = [Prompt(str(k)) for k in range(5)]
    assert each(prompts, 3) == [(k, copy) for k in range(5) for copy in range(3)]


def test_spread_images_visit_tags_evenly_and_prompts_before_copies():
    prompts = [Prompt(f"{tag}{k}", tag) for tag, number in (("a", 7), ("b", 3)) for k in range(number)]
    rows = spread(prompts, 18)
    tags = [prompts[index].tag for index, _ in rows]
    assert tags.count("a") == tags.count("b") == 9 and len(set(rows)) == 18
    of_b = [row for row in rows if prompts[row[0]].tag == "b"]
    assert sorted(copy for _, copy in of_b) == [0] * 3 + [1] * 3 + [2] * 3
    assert torch.tensor([copy for _, copy in of_b]).diff().min() >= 0


def test_as_many_images_as_prompts_are_one_of_each():
    """So that the mean is over the prompts, as it is published."""
    prompts = [Prompt(f"{tag}{k}", tag) for tag, number in (("a", 7), ("b", 3)) for k in range(number)]
    assert sorted(spread(prompts, 10)) == each(prompts, 1) and sorted(spread(prompts, 30)) == each(prompts, 3)
    assert {prompts[index].tag for index, _ in spread(prompts, 10)[:5]} == {"a", "b"}
