"""`flowtilt doctor --public` on a stand-in: the protocol of the published numbers, and what is said where they are not met."""

import json
from dataclasses import replace

import pytest
from conftest import two_blocks

from flowtilt.cli import main
from flowtilt.evaluate import public
from flowtilt.evaluate.public import NUMBERS, command, reproduce


@pytest.fixture
def stand_in(tmp_path, finished):
    """Both numbers with a small pipeline, a small run's LoRA and a reward of a line."""
    (tmp_path / "two.txt").write_text("a red circle\na blue square\n")
    (tmp_path / "mine.py").write_text("def light(images, prompts):\n    return images.mean((1, 2, 3))\n")
    small = {
        "model": two_blocks().partition("=")[2],
        "prompts": str(tmp_path / "two.txt"),
        "reward": f"{tmp_path}/mine.py:light",
        "column": "light",
        "resolution": 32,
        "steps": 2,
        "dtype": None,
        "t5_length": 1,
        "score": 0.5,
        "tolerance": 0.5,
    }
    base, tuned = (replace(number, **small) for number in NUMBERS[:2])
    return base, replace(tuned, loras=(str(finished / "lora" / "pytorch_lora_weights.safetensors"),))


def test_the_published_protocol_is_what_is_typed(tmp_path):
    base, tuned, geneval2 = (command(number, tmp_path, 50) for number in NUMBERS)
    for words in (
        "--prompts drawbench",
        "--rewards pickscore",
        "--images 50",
        "--steps 40",
        "--guidance 1",
        "--resolution 512",
        "--levels stock",
        "--dtype float16",
    ):
        assert words in base and words in tuned
    assert "--lora worstcoder/SD3.5M-DiffusionNFT-MultiReward" in tuned and "--lora" not in base
    assert [number.score for number in NUMBERS] == [20.51, 23.80, 0.124]
    assert "--prompts geneval2_data.jsonl --rewards geneval2 " in geneval2 and "--guidance 4.5" in geneval2


def test_numbers_are_within_their_range_or_said_to_be_wrong_and_their_protocol_is_kept(stand_in, tmp_path):
    commands: list[str] = []
    lines = list(reproduce(tmp_path / "out", stand_in, images=2, say=commands.append))
    assert len(commands) == 2 and all(line.startswith("ok ") for line in lines), lines
    protocol = json.loads((tmp_path / "out" / "DiffusionNFT" / "results.json").read_text())["protocol"]
    assert protocol["levels"] == "stock" and protocol["resolution"] == 32 and len(protocol["lora"]) == 1
    (line,) = reproduce(tmp_path / "out", [replace(stand_in[0], tolerance=None)], images=2)
    assert line.startswith("-") and "published 0.5, of a protocol that is not" in line
    (line,) = reproduce(tmp_path / "out", NUMBERS[2:], images=2)
    assert line.startswith("-       GenEval2: left out; it needs geneval2_data.jsonl here")
    wrong = [replace(number, score=3.0, tolerance=0.1) for number in stand_in[:1]]
    (line,) = reproduce(tmp_path / "out", wrong, images=2)  # what is there is not sampled again
    assert line.startswith("WRONG") and "published 3.00, expected 2.50 to 3.50" in line


def test_what_is_not_here_is_said_to_be_missing(stand_in, tmp_path, monkeypatch, capsys):
    gone = [replace(number, model=str(tmp_path / "gone")) for number in stand_in]
    monkeypatch.setattr(public.reproduce, "__defaults__", (gone, 2, None))
    assert main(["doctor", "--public", "--images", "2", "-o", str(tmp_path / "out")]) == 1
    assert all(line.startswith("MISSING") and "gone" in line for line in capsys.readouterr().out.splitlines())
