"""Reward files: their neighbours, their place, and what is said where the function is missing."""

import sys

import pytest
import torch

from flowtilt import UserError
from flowtilt.io.user_code import absolute
from flowtilt.prompts import Prompt
from flowtilt.rewards import load_reward, score
from flowtilt.rewards.named import parse

GREY = torch.full((1, 3, 2, 2), 0.5)


def value(source):
    return float(score({"r": load_reward("r", str(source))}, GREY, [Prompt("a")])[0]["r"])


def write(folder, **files):
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (folder / f"{name}.py").write_text(text)
    return folder


def times(module):
    return f"from {module} import FACTOR\ndef f(images, prompts):\n    return FACTOR * images.mean((1, 2, 3))\n"


# neighbours -------------------------------------------------------------------------------------------------


def test_a_file_imports_its_neighbours_and_leaves_the_path_as_it_was(tmp_path):
    write(tmp_path, mine=times("factors_beside"), factors_beside="FACTOR = 3.0\n")
    before = list(sys.path)
    assert value(f"{tmp_path}/mine.py:f") == 1.5
    assert sys.path == before


def test_two_folders_have_neighbours_of_one_name_without_mixing_them(tmp_path):
    for folder, factor in (("a", 3.0), ("b", 5.0)):
        write(tmp_path / folder, mine=times("shared_name"), shared_name=f"FACTOR = {factor}\n")
    assert [value(tmp_path / folder / "mine.py:f") for folder in ("a", "b", "a")] == [1.5, 2.5, 1.5]


def test_two_files_of_a_folder_share_a_neighbour(tmp_path):
    write(tmp_path, one=times("counted_once"), two=times("counted_once"))
    (tmp_path / "counted_once.py").write_text(
        "import pathlib\nFACTOR = 2.0\nopen(pathlib.Path(__file__).with_suffix('.log'), 'a').write('x')\n"
    )
    assert value(tmp_path / "one.py:f") == value(tmp_path / "two.py:f") == 1.0
    assert (tmp_path / "counted_once.log").read_text() == "x"


def test_the_path_is_as_it_was_also_where_the_import_fails(tmp_path):
    write(tmp_path, mine="import no_such_neighbour\n")
    before = list(sys.path)
    with pytest.raises(
        UserError, match=r"importing .*mine\.py failed: ModuleNotFoundError: No module named 'no_such_neighbour', at .*mine\.py:1"
    ):
        load_reward("r", f"{tmp_path}/mine.py:f")
    assert sys.path == before


def test_a_dataclass_of_a_file_with_postponed_annotations_can_be_made(tmp_path):
    text = (
        "from __future__ import annotations\nfrom dataclasses import dataclass\n\n"
        "@dataclass\nclass Judge:\n    device: str\n    def __call__(self, images, prompts):\n        return images.mean((1, 2, 3))\n"
    )
    write(tmp_path, mine=text)
    assert value(f"{tmp_path}/mine.py:Judge") == 0.5


# places ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("source", ["pickscore", "http://host:8765", "https://host/a:b", "/abs/mine.py:f", "mine.py"])
def test_names_addresses_and_whole_paths_are_absolute_already(source):
    assert absolute(source) == source


def test_a_files_source_is_the_same_from_another_folder(tmp_path, monkeypatch):
    write(tmp_path / "work" / "rewards", mine=times("math_beside"), math_beside="FACTOR = 1.0\n")
    monkeypatch.chdir(tmp_path / "work")
    source = absolute("rewards/../rewards/mine.py:f")
    monkeypatch.chdir("/")
    assert source == f"{tmp_path}/work/rewards/mine.py:f" and value(source) == 0.5


# the function ----------------------------------------------------------------------------------------------


TWO = "def brightness(images, prompts): ...\ndef _hidden(): ...\nclass Sharpness: ...\nraise SystemExit('this must not run')\n"


@pytest.mark.parametrize(
    ("source", "said"),
    [
        ("my_reward.py", r'add ":function" to my_reward\.py, as in my_reward\.py:brightness; it has brightness, Sharpness$'),
        ("other.py", r"no file other\.py$"),
        ("torn.py", r'add ":function" to torn\.py, as in torn\.py:function; no function or class was found in it$'),
        ("jpeg_compresibility", "did you mean 'jpeg_compressibility'"),
    ],
)
def test_a_file_without_its_function_is_told_what_to_add(tmp_path, monkeypatch, source, said):
    write(tmp_path, my_reward=TWO, torn="def f(:\n")
    monkeypatch.chdir(tmp_path)
    (named,) = parse([source])
    with pytest.raises(UserError, match=said):
        load_reward(named.name, named.source)


def test_a_function_that_is_not_there_is_answered_with_those_that_are(tmp_path, monkeypatch):
    write(tmp_path, mine="def brightness(images, prompts): ...\ndef contrast(images, prompts): ...\n")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=r"no function 'brightnes' in mine\.py; did you mean 'brightness'\?"):
        load_reward("r", "mine.py:brightnes")
    with pytest.raises(UserError, match=r"no function 'xyz' in mine\.py; it has brightness, contrast"):
        load_reward("r", "mine.py:xyz")
