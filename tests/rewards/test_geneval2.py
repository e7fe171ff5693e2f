"""GenEval 2: its lines are read, its questions asked, and Soft-TIFA computed as published."""

import json
import math

import pytest
import torch
from judge_stub import likely, question_of, stub

from flowtilt.errors import UserError
from flowtilt.prompts import Prompt, geneval2, load_prompts
from flowtilt.rewards import load_reward, score
from flowtilt.rewards.geneval2 import forms
from flowtilt.rewards.judge.questions import Question, questions_of

LINE = {
    "prompt": "two red dogs above a cat",
    "atom_count": 5,
    "vqa_list": [
        ["Is there a dog?", "Yes"],
        ["How many dogs are in the image?", "two"],
        ["Are the dogs red?", "Yes"],
        ["How many cats?", "one"],
    ],
    "skills": ["object", "count", "attribute", "count"],
}


@pytest.fixture
def prompt(tmp_path):
    (tmp_path / "geneval2_data.jsonl").write_text(json.dumps(LINE) + "\n")
    (found,) = load_prompts(tmp_path / "geneval2_data.jsonl")
    return found


def test_a_line_is_read_with_its_number_of_parts_as_the_tag(prompt):
    assert prompt.tag == "5 atoms" and [question.skill for question in questions_of(prompt)] == LINE["skills"]


def test_a_number_counts_as_a_word_and_as_a_digit():
    assert forms(Question("How many dogs?", "seven")) == ("seven", "7") and forms(Question("Is there a dog?")) == ("yes",)
    assert forms(Question("What is on two legs?", "two")) == ("two",)


def test_soft_tifa_is_the_mean_of_the_sums_of_probabilities_that_are_not_divided_by_no(prompt, monkeypatch):
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    said = {
        "dog?": likely(Yes=0.5, yes=0.25, No=0.1),
        "dogs are": likely(two=0.4, Two=0.1, **{"2": 0.1, "3": 0.2}),
        "red": likely(No=0.98, The=0.01),
        "cats": likely(one=0.9),
        "grey": likely(Yes=1.0),
    }
    with stub(lambda question, *_: next(answer for part, answer in said.items() if part in question)) as server:
        reward = load_reward("bench", "geneval2", options={"url": server.url})
        scores, notes = score({"bench": reward}, torch.rand(1, 3, 8, 8), [prompt])
        assert {question_of(request) for request in server.asked} == {f"{question} Answer in one word." for question, _ in LINE["vqa_list"]}
    atoms = [0.75, 0.6, 0.01, 0.9]
    expected = {"": math.prod(atoms) ** 0.25, "/am": sum(atoms) / 4, "/tifa": 0.75, "/object": 0.75, "/count": 0.75, "/attribute": 0.01}
    for name, value in expected.items():
        assert scores[f"bench{name}"].tolist() == pytest.approx([value], rel=1e-5), name
    assert scores["bench/verb"].isnan().all() and notes == ["Are the dogs red? Yes: 0.01"]


def test_a_server_without_log_probabilities_and_a_prompt_without_questions_are_said(monkeypatch):
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    with stub("Yes") as server:
        with pytest.raises(UserError, match="gives no log-probabilities"):
            load_reward("bench", "geneval2", options={"url": server.url})
        words = load_reward("bench", "geneval2", options={"url": server.url, "logprobs": "auto"})
        assert words.applies(Prompt("x")).startswith("no questions")  # type: ignore[attr-defined]


def test_prompts_of_its_form_have_as_many_parts_as_they_say_and_are_drawn_one_by_one():
    some = geneval2.generate(40, seed=3)
    assert some[:10] == geneval2.generate(10, seed=3) and len({prompt.text for prompt in some}) == 40
    assert {prompt.tag for prompt in some} == {f"{n} atoms" for n in range(3, 11)}
    for prompt in some:
        skills = [question.skill for question in questions_of(prompt)]
        singles = sum(question.answer == "one" for question in questions_of(prompt))
        assert len(skills) - singles == prompt.metadata["atom_count"]
    first = some[0].text
    assert first not in {prompt.text for prompt in geneval2.generate(10, seed=3, exclude=[first])}
    assert json.loads(geneval2.to_lines(some).splitlines()[0])["prompt"] == first
