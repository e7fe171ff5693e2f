"""What a reward's own bug says: which reward, what, in which line of the user's file. And that it is found early."""

import logging

import pytest
import torch
from reward_servers import ask, asking, grey, logged, running

from flowtilt import RewardOutput, UserError
from flowtilt.cli import main
from flowtilt.prompts import Prompt
from flowtilt.rewards import applies, load_reward, score
from flowtilt.rewards.trial import preflight

BUGS = """
from helpers_of_bugs import fail


def deep(images, prompts):
    return images.mean((1, 2, 3)) + torch_is_missing


def in_a_library(images, prompts):
    return images.view(7, 7, 7)


def in_a_neighbour(images, prompts):
    return fail(images)


def ends(images, prompts):
    raise SystemExit


class Picky:
    def __init__(self, *, device, colour=None):
        self.code = int(colour or 0)

    def applies(self, prompt):
        return {"why": ""}[prompt.text]

    def __call__(self, images, prompts):
        return images.mean((1, 2, 3))


class Yes(Picky):
    def applies(self, prompt):
        return True
"""
PROMPTS = [Prompt("a"), Prompt("b")]


@pytest.fixture
def bugs(tmp_path, monkeypatch):
    (tmp_path / "bugs.py").write_text(BUGS)
    (tmp_path / "helpers_of_bugs.py").write_text("def fail(images):\n    raise KeyError('colour')\n")
    monkeypatch.chdir(tmp_path)
    return lambda name, **options: load_reward(name, f"bugs.py:{name}", options=options)


def complaint(name, reward):
    with pytest.raises(UserError) as caught:
        score({name: reward}, torch.rand(2, 3, 4, 4), PROMPTS)
    return str(caught.value)


@pytest.mark.parametrize(
    ("name", "what"),
    [
        ("deep", "NameError: name 'torch_is_missing' is not defined, at bugs.py:6"),
        ("in_a_library", "RuntimeError: shape '[7, 7, 7]' is invalid for input of size 96, at bugs.py:10"),
        ("in_a_neighbour", "KeyError: 'colour', at helpers_of_bugs.py:2"),
        ("ends", "SystemExit, at bugs.py:18"),
    ],
)
def test_a_bug_is_told_with_its_line_in_the_users_files(bugs, name, what):
    assert (
        complaint(name, bugs(name))
        == f'reward {name} failed: {what} (prompts from "a" on; --debug shows the traceback); nothing was scored'
    )


def test_a_user_error_is_the_rewards_own_words(bugs):
    def careful(images, prompts):
        raise UserError("the colours are missing; run make colours")

    assert complaint("careful", careful) == (
        'reward careful failed: the colours are missing; run make colours (prompts from "a" on); nothing was scored'
    )


def test_a_bug_while_a_class_is_built_is_told_so_too(bugs):
    with pytest.raises(UserError, match=r"building bugs\.py:Picky failed: ValueError: .*'red', at bugs\.py:23 \(--debug shows"):
        bugs("Picky", colour="red")


def test_a_bug_in_applies_is_told_and_a_yes_is_no_reason(bugs):
    with pytest.raises(UserError, match=r"""Picky\.applies failed: KeyError: 'a', at bugs\.py:26 \(prompt "a"; --debug"""):
        applies(bugs("Picky"), Prompt("a"))
    assert applies(bugs("Picky"), Prompt("why")) == ""
    with pytest.raises(UserError, match=r"""Yes\.applies: returned True, want why a prompt can't be judged, "" where it can"""):
        applies(bugs("Yes"), Prompt("a"))


def test_a_file_that_ends_the_program_is_one_line(tmp_path, monkeypatch, capsys):
    (tmp_path / "script.py").write_text("import sys\nsys.exit('usage: script.py IMAGE')\n")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "images").mkdir()
    assert main(["serve-rewards", "--rewards", "f=script.py:f", "--port", "0"]) == 2
    assert "importing script.py failed: SystemExit: usage: script.py IMAGE, at script.py:2" in capsys.readouterr().err


def test_a_server_logs_a_line_and_tells_its_client_the_place(bugs):
    with running({"deep": bugs("deep")}) as (url, _), logged(logging.ERROR) as lines:
        status, said = ask(url, asking("deep", [grey(1)]))
    what = "NameError: name 'torch_is_missing' is not defined, at bugs.py:6"
    assert (status, said) == (422, {"error": what})
    assert lines == [f"reward deep failed: {what}"]


# once before the run -----------------------------------------------------------------------------------


def tried(reward, prompts=PROMPTS, seed=0):
    preflight({"mine": reward}, prompts, side=16, device="cpu", seed=seed)


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        (lambda images: images.mean(), r"returned a tensor of shape \[\] and float32, want a tensor of shape \[2\]"),
        (lambda images: images.mean((2, 3)), r"returned a tensor of shape \[2, 3\]"),
        (lambda images: 0.5, "returned a float"),
        (lambda images: RewardOutput(images.mean((1, 2, 3)), ["only one"]), "returned 1 of 2 notes"),
        (lambda images: images.mean((1, 2, 3)) / 0, "infinite"),
    ],
)
def test_a_wrong_answer_is_found_before_the_run(answer, said):
    with pytest.raises(UserError, match=said):
        tried(lambda images, prompts: answer(images))


def test_a_trial_is_two_images_of_seeded_noise_and_two_of_the_prompts_it_can_judge():
    seen = []

    class Odd:
        def applies(self, prompt):
            return "" if int(prompt.text) % 2 else "even"

        def __call__(self, images, prompts):
            seen.append((images.clone(), [prompt.text for prompt in prompts]))
            return torch.full((2,), torch.nan)  # noise may well have no score

    prompts = [Prompt(str(k)) for k in range(10)]
    for seed in (0, 0, 1):
        tried(Odd(), prompts, seed)
    assert [texts for _, texts in seen] == [["1", "3"]] * 3
    images = [image for image, _ in seen]
    assert images[0].shape == (2, 3, 16, 16) and 0 <= images[0].min() < 0.1 and 0.9 < images[0].max() <= 1
    assert torch.equal(images[0], images[1]) and not torch.equal(images[0], images[2]) and not torch.equal(images[0][0], images[0][1])
    tried(Odd(), prompts[:2])
    assert seen[-1][1] == ["1", "1"]
    tried(Odd(), prompts[:1])
    assert len(seen) == 4


def test_a_judge_behind_a_network_is_not_tried():
    class Dear:
        off_device = True

        def __call__(self, images, prompts):
            raise AssertionError("this costs money")

    tried(Dear())
