"""A reward says of itself what others need: a built-in one in its own file without torch, a user's own by attributes."""

import inspect
import subprocess
import sys
from importlib import import_module
from typing import ClassVar

import pytest
import torch

from flowtilt import UserError
from flowtilt.plan.judges import judging
from flowtilt.rewards import load_reward
from flowtilt.rewards.about import Facts, about_column, built_in, of_paper
from flowtilt.rewards.facts import built_in_name, facts_of, ranges_of
from flowtilt.rewards.named import Named
from flowtilt.rewards.ocr import OCR


def named(source):
    place, _, name = source.partition(":")
    return getattr(import_module(place), name)


# built in -----------------------------------------------------------------------------------------------


def test_descriptions_are_read_without_torch():
    code = "import sys; from flowtilt.rewards.about import built_in; assert len(built_in()) > 9; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize("name", built_in())
def test_a_description_is_true_of_its_code(name):
    about = built_in()[name]
    found = named(about.source)
    assert callable(found) and built_in_name(found) == name
    assert hasattr(found, "differentiable") == about.differentiable
    assert all(callable(named(network)) for network in about.networks.values())
    call = found.__call__ if inspect.isclass(found) else found
    assert list(inspect.signature(call).parameters)[-2:] == ["images", "prompts"]


def test_the_eight_of_the_papers_table_are_in_its_order():
    assert of_paper()[:3] == ("geneval", "ocr", "pickscore") and len(of_paper()) == 8


def test_a_column_is_described_by_its_reward():
    assert about_column("geneval/strict") is built_in()["geneval"] and about_column("mine") is None
    assert built_in()["geneval"].ranges("g") == {"g": (0, 1), "g/strict": (0, 1), "g/correct": (0, 1)}


# a user's own -------------------------------------------------------------------------------------------


def brightness(images, prompts, *, gain=1.0):
    return gain * images.mean((1, 2, 3))


class Contrast:
    score_range = (0, 0.5)
    detail_ranges: ClassVar = {"red": (0, 1)}
    reads_prompt = False
    off_device = True
    plan_note = "0.1 s per image"

    def __call__(self, images, prompts):
        return images.std((1, 2, 3))

    def differentiable(self, images, prompts):
        return self(images, prompts)


def test_what_is_not_said_is_not_known():
    assert facts_of("f", brightness) == facts_of("f", lambda images, prompts: images.mean((1, 2, 3))) == Facts()


@pytest.mark.parametrize("reward", [Contrast, Contrast()])
def test_attributes_say_what_a_description_says(reward):
    found = facts_of("mine", reward)
    assert found.ranges("mine") == {"mine": (0.0, 0.5), "mine/red": (0.0, 1.0)}
    assert (found.reads_prompt, found.off_device, found.differentiable) == (False, True, True)
    assert found.plan_note_for({}) == "0.1 s per image"


def test_options_do_not_hide_a_functions_attributes(monkeypatch):
    monkeypatch.setattr(brightness, "score_range", (0, 2), raising=False)
    reward = load_reward("b", brightness, options={"gain": 2.0})
    assert ranges_of({"b": reward}) == {"b": (0.0, 2.0)}
    assert reward(torch.ones(1, 3, 2, 2), []).item() == 2


def test_a_class_that_extends_a_built_in_one_keeps_its_facts_unless_it_says_otherwise():
    class Mine(OCR):
        reads_prompt = False

    found = facts_of("mine", Mine)
    assert found.off_device and found.score_range == (0, 1) and found.reads_prompt is False
    assert built_in_name(Mine) is None


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("score_range", (1, 0), r"score_range is \(1, 0\), want the lowest and the highest score, as in \(0, 1\)"),
        ("score_range", "wide", "score_range is 'wide', want"),
        ("score_range", (0, float("inf")), "score_range is .*want the lowest and the highest"),
        ("detail_ranges", {"red": 1}, "detail_ranges is .* want a range by detail"),
        ("reads_prompt", "no", "reads_prompt is 'no', want True or False"),
        ("plan_note", 0.1, "plan_note is 0.1, want the text"),
    ],
)
def test_a_wrong_attribute_is_one_line(key, value, said):
    reward = type("Mine", (), {key: value, "__call__": lambda self, images, prompts: images})
    with pytest.raises(UserError, match=f"reward mine: {said}"):
        facts_of("mine", reward)


def test_plan_reads_them_from_the_users_file(tmp_path):
    (tmp_path / "mine.py").write_text(
        "def quick(images, prompts): ...\ndef slow(images, prompts): ...\nslow.off_device, slow.plan_note = True, 'an hour'\n"
    )
    names = {name: Named(name, f"{tmp_path}/mine.py:{name}") for name in ("quick", "slow", "none")}
    found = judging(list(names.values()), 512)
    assert found.off_device and found.beside["slow"] == "an hour" and found.beside["quick"].startswith("your own")
    assert "no function 'none'" in found.beside["none"]
    assert not judging([names["quick"]], 512).off_device
