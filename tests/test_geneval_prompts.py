"""Generated prompts have GenEval's words and metadata, are all different, and miss what they are told to miss."""

import json
import time
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flowtilt.cli import main
from flowtilt.errors import UserError
from flowtilt.prompts import load_prompts
from flowtilt.prompts.geneval import SPACES, caption, generate, to_lines
from flowtilt.prompts.geneval_objects import RELATIONS, TAGS
from flowtilt.rewards.geneval import GenEval, judge

FEW = settings(deadline=None, max_examples=25)

# as the benchmark writes them, articles and plurals included
LINES = (
    '{"tag": "single_object", "include": [{"class": "skis", "count": 1}], "prompt": "a photo of a skis"}\n'
    '{"tag": "single_object", "include": [{"class": "umbrella", "count": 1}], "prompt": "a photo of an umbrella"}\n'
    '{"tag": "two_object", "include": [{"class": "frisbee", "count": 1}, {"class": "apple", "count": 1}], '
    '"prompt": "a photo of a frisbee and an apple"}\n'
    '{"tag": "counting", "include": [{"class": "bench", "count": 4}], '
    '"exclude": [{"class": "bench", "count": 5}], "prompt": "a photo of four benchs"}\n'
    '{"tag": "counting", "include": [{"class": "wine glass", "count": 2}], '
    '"exclude": [{"class": "wine glass", "count": 3}], "prompt": "a photo of two wine glasses"}\n'
    '{"tag": "counting", "include": [{"class": "person", "count": 3}], '
    '"exclude": [{"class": "person", "count": 4}], "prompt": "a photo of three persons"}\n'
    '{"tag": "colors", "include": [{"class": "orange", "count": 1, "color": "orange"}], "prompt": "a photo of an orange orange"}\n'
    '{"tag": "colors", "include": [{"class": "airplane", "count": 1, "color": "yellow"}], '
    '"prompt": "a photo of a yellow airplane"}\n'
    '{"tag": "position", "include": [{"class": "airplane", "count": 1}, {"class": "cow", "count": 1, "position": ["below", 0]}], '
    '"prompt": "a photo of a cow below an airplane"}\n'
    '{"tag": "color_attr", "include": [{"class": "surfboard", "count": 1, "color": "green"}, '
    '{"class": "oven", "count": 1, "color": "orange"}], "prompt": "a photo of a green surfboard and an orange oven"}\n'
)


def everything(tag):
    size, member = SPACES[tag]
    return [member(k) for k in range(size)]


def test_the_benchmark_s_prompts_come_out_word_for_word(tmp_path):
    path = tmp_path / "some.jsonl"
    path.write_text(LINES)
    prompts = load_prompts(path)
    assert [caption(prompt.metadata["include"]) for prompt in prompts] == [prompt.text for prompt in prompts]
    assert to_lines(prompts) == LINES


def test_the_benchmark_s_prompts_can_be_drawn():
    drawn = {tag: {json.dumps(include) for include in everything(tag)} for tag in TAGS if tag != "color_attr"}
    for line in LINES.splitlines():
        record = json.loads(line)
        if record["tag"] in drawn:
            assert json.dumps(record["include"]) in drawn[record["tag"]]


@pytest.mark.parametrize("tag", [tag for tag in TAGS if tag != "color_attr"])
def test_a_tag_s_prompts_are_all_different(tag):
    assert len({caption(include) for include in everything(tag)}) == SPACES[tag][0]


def test_the_tags_have_the_sizes_of_their_templates():
    """80 classes, 78 of them counted, 79 coloured; ten colours, four relations, three numbers; pairs in either order."""
    sizes = {tag: size for tag, (size, _) in SPACES.items()}
    assert sizes == {
        "single_object": 80,
        "two_object": 80 * 79,
        "counting": 78 * 3,
        "colors": 79 * 10,
        "position": 80 * 79 * 4,
        "color_attr": 79 * 78 * 10 * 9,
    }


def test_a_file_of_them_reads_as_the_same_prompts(tmp_path):
    prompts = generate(600, 3)
    path = tmp_path / "train.jsonl"
    path.write_text(to_lines(prompts))
    assert load_prompts(path) == prompts
    order = {"tag": 0, "include": 1, "exclude": 2, "prompt": 3}
    for line in to_lines(prompts).splitlines():
        places = [order[key] for key in json.loads(line)]
        assert places == sorted(places)


@FEW
@given(seed=st.integers(0, 2**40), few=st.integers(0, 200), more=st.integers(0, 900))
def test_fewer_are_the_beginning_of_more(seed, few, more):
    assert generate(few + more, seed)[:few] == generate(few, seed)


def test_another_seed_draws_others():
    first, second = ({prompt.text for prompt in generate(300, seed)} for seed in (0, 1))
    assert len(first & second) < 150


@FEW
@given(number=st.integers(1, 400), seed=st.integers(0, 9))
def test_tags_are_equally_frequent_while_they_last(number, seed):
    counts = Counter(prompt.tag for prompt in generate(number, seed))
    assert max(counts.values()) - min(counts[tag] for tag in TAGS) <= 1


@FEW
@given(seed=st.integers(0, 9), data=st.data())
def test_what_is_excluded_is_not_drawn_and_the_rest_keeps_its_order(seed, data):
    prompts = generate(120, seed)
    excluded = {prompts[k].text for k in data.draw(st.sets(st.integers(0, 119), max_size=40))}
    texts = [prompt.text for prompt in generate(120, seed, excluded)]
    assert not excluded & set(texts)
    for tag in TAGS:
        places = {prompt.text: k for k, prompt in enumerate(prompts) if prompt.tag == tag}
        kept = [places[text] for text in texts if text in places]
        assert kept == sorted(kept) and len(kept) >= len(places) - 2 * len(excluded)


@pytest.fixture
def few(monkeypatch):
    """Of the most numerous tag three prompts only; returns how many there are of all tags."""
    pairs = [(("dog", "red"), ("cat", "blue")), (("cat", "blue"), ("dog", "red")), (("cat", "red"), ("dog", "blue"))]
    includes = [[{"class": name, "count": 1, "color": color} for name, color in pair] for pair in pairs]
    monkeypatch.setitem(SPACES, "color_attr", (3, includes.__getitem__))
    return sum(size for size, _ in SPACES.values())


def test_the_same_said_in_the_other_order_is_excluded_too(few):
    excluded = {"a photo of a dog and a cat", "a photo of a dog left of a cat", "a photo of a red dog and a blue cat"}
    turned = {"a photo of a cat and a dog", "a photo of a cat right of a dog", "a photo of a blue cat and a red dog"}
    every = {prompt.text for prompt in generate(few, 0)}
    rest = {prompt.text for prompt in generate(few - 6, 0, excluded)}
    assert every - rest == excluded | turned


def test_asking_for_more_than_there_are_says_how_many_there_are(few):
    assert len(generate(few, 0)) == few
    with pytest.raises(UserError, match=f"{few} prompts here, not {few + 1}"):
        generate(few + 1, 0)


def test_fifty_thousand_take_seconds_and_the_large_tags_fill_up():
    start = time.perf_counter()
    prompts = generate(50_000, 0)
    assert time.perf_counter() - start < 10
    assert len({prompt.text for prompt in prompts}) == 50_000
    counts = Counter(prompt.tag for prompt in prompts)
    assert [counts[tag] for tag in ("single_object", "two_object", "counting", "colors")] == [80, 6320, 234, 790]
    assert abs(counts["position"] - counts["color_attr"]) <= 1


def scene(prompt):
    """Detections as the prompt asks for them, without regard to relations other than its own."""
    places = {"left of": (0, 500), "right of": (900, 500), "above": (500, 0), "below": (500, 900)}
    found = []
    for entry in prompt.metadata["include"]:
        x, y = places[entry["position"][0]] if "position" in entry else (500, 500)
        one = {"class": entry["class"], "score": 0.95, "box": (x, y, x + 50, y + 50), "color": entry.get("color")}
        found += [one] * entry["count"]
    return found


def test_the_judge_takes_them_and_a_scene_drawn_to_them_is_right():
    prompts = generate(1500, 5)
    assert {entry["position"][0] for p in prompts for entry in p.metadata["include"] if "position" in entry} == set(RELATIONS)
    for prompt in prompts:
        assert GenEval.applies(prompt) == ""
        verdict = judge(scene(prompt), {"tag": prompt.tag, **prompt.metadata})
        assert verdict.strict and verdict.correct and verdict.score == 1
        extra = judge([*scene(prompt), scene(prompt)[0]], {"tag": prompt.tag, **prompt.metadata})
        assert not extra.strict and extra.correct == (prompt.tag != "counting")


def test_the_playgrounds_prompts_can_be_excluded_by_name(capsys):
    assert main(["prompts", "geneval", "--n", "3", "--exclude", "playground"]) == 0
    assert capsys.readouterr().out == to_lines(generate(3, 0))
