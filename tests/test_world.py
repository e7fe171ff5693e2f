"""The drawn world: what its split keeps apart, and that its pictures show their captions."""

import os
import subprocess
import sys
from itertools import combinations

import pytest
import torch

from flowtilt.errors import UserError
from flowtilt.playground import world
from flowtilt.playground.world import COLORS, RELATIONS, SHAPES, SIZE, TAGS
from flowtilt.prompts import Prompt
from flowtilt.seeding import generator

TRAIN, TEST = world.prompts("train"), world.prompts("test")
SEARCH, VALIDATION = world.search_prompts("train"), world.search_prompts("validation")
EVERY = TRAIN + TEST


def content(prompt: Prompt) -> frozenset[tuple]:
    """What a caption names, whatever the order and the relation."""
    return frozenset((entry["count"], entry.get("color"), entry["class"]) for entry in prompt.metadata["include"])


def scenes(prompt: Prompt, count: int) -> list[list[world.Object]]:
    return [world.arrange(prompt, generator(0, "test world", k)) for k in range(count)]


def test_train_and_test_share_no_combination():
    assert not {content(p) for p in TRAIN} & {content(p) for p in TEST}


def test_the_search_divides_the_training_prompts_and_shares_no_combination_with_the_validation():
    assert {p.text for p in SEARCH + VALIDATION} < {p.text for p in TRAIN}  # thinned placements are in neither
    assert not {content(p) for p in SEARCH} & {content(p) for p in VALIDATION}
    left_out = [p for p in TRAIN if p.text not in {q.text for q in SEARCH}]
    assert {content(p) for p in left_out} == {content(p) for p in VALIDATION}


def test_the_validation_is_made_as_the_test_is():
    def count(prompts: list[Prompt]) -> list[int]:
        return [sum(p.tag == tag for p in prompts) for tag in TAGS]

    assert count(VALIDATION) == count(TEST)


def test_no_train_caption_places_the_objects_of_a_test_caption_in_any_order_or_relation():
    train = {p.text for p in TRAIN}
    for prompt in TEST:
        if len(prompt.metadata["include"]) == 2:
            a, b = (f"a {entry.get('color', '')} {entry['class']}".replace("  ", " ") for entry in prompt.metadata["include"])
            assert not train & {f"{x} {word} {y}" for word in ("and", *RELATIONS) for x, y in ((a, b), (b, a))}


def test_captions_are_distinct_and_of_22_words():
    assert len({p.text for p in EVERY}) == len(EVERY)
    assert len({word for p in EVERY for word in p.text.split()}) == 22


@pytest.mark.parametrize("split", [TRAIN, TEST, SEARCH, VALIDATION], ids=["train", "test", "search", "validation"])
def test_all_six_tags_are_on_both_sides(split):
    assert list(dict.fromkeys(p.tag for p in split)) == list(TAGS)


@pytest.mark.parametrize("split", [TRAIN, TEST, SEARCH, VALIDATION], ids=["train", "test", "search", "validation"])
def test_every_shape_colour_count_and_relation_is_on_both_sides(split):
    entries = [entry for p in split for entry in p.metadata["include"]]
    assert {entry["class"] for entry in entries} == set(SHAPES)
    assert {entry.get("color") for entry in entries} == {None, *COLORS}
    assert {entry["count"] for entry in entries} == {1, 2, 3, 4}
    assert {entry["position"][0] for entry in entries if "position" in entry} == set(RELATIONS)


def test_the_split_is_the_same_in_another_process_with_another_hash_seed():
    code = "from flowtilt.playground import world; print([p.text for s in ('train', 'test') for p in world.prompts(s)]"
    code += " + [p.text for p in world.search_prompts('validation')])"
    done = subprocess.run(
        [sys.executable, "-c", code], env=os.environ | {"PYTHONHASHSEED": "7"}, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == str([p.text for p in EVERY + VALIDATION])


def test_an_unknown_split_is_refused():
    with pytest.raises(ValueError, match="'valid' is not 'train' or 'test'"):
        world.prompts("valid")
    with pytest.raises(ValueError, match="'test' is not 'train' or 'validation'"):
        world.search_prompts("test")


def test_every_caption_parses_to_its_prompt_whatever_its_case_and_spaces():
    for prompt in EVERY:
        assert world.parse("  " + prompt.text.upper().replace(" ", "  ") + "\n") == prompt
        assert world.parse(prompt.text).metadata == prompt.metadata


@pytest.mark.parametrize(
    "text", ["", "a purple circle", "five circles", "a red circle and a red square", "a circle and a circle", "two red circle"]
)
def test_a_caption_outside_the_grammar_is_a_user_error_that_names_it(text):
    with pytest.raises(UserError, match=f'prompt "{text}": not in the playground\'s grammar; try '):
        world.parse(text)


def test_scenes_have_the_counts_shapes_and_colours_of_their_captions():
    for prompt in EVERY:
        named = [(entry.get("color"), entry["class"]) for entry in prompt.metadata["include"] for _ in range(entry["count"])]
        for scene in scenes(prompt, 2):
            assert [o.shape for o in scene] == [shape for _, shape in named]
            assert all(color in (None, o.color) for o, (color, _) in zip(scene, named, strict=True))


def test_related_objects_stand_in_their_relation_by_more_than_an_object():
    for prompt in EVERY:
        for entry in prompt.metadata["include"]:
            if "position" not in entry:
                continue
            relation, other = entry["position"]
            assert (entry, other) == (prompt.metadata["include"][0], 1) and relation in prompt.text
            for a, b in scenes(prompt, 4):
                assert {"left of": b.x - a.x, "right of": a.x - b.x, "above": b.y - a.y, "below": a.y - b.y}[relation] > 10


def test_the_other_axis_of_a_relation_is_free():
    a_beside, a_lower, a_higher = set(), set(), set()
    for a, b in scenes(world.parse("a red circle left of a blue square"), 60):
        a_beside.add(abs(a.y - b.y) < 4)
        a_lower.add(a.y - b.y > 10)
        a_higher.add(b.y - a.y > 10)
    assert a_beside == a_lower == a_higher == {True, False}


def test_a_caption_with_and_is_drawn_in_reading_order():
    for prompt in EVERY:
        if " and " in prompt.text:
            for a, b in scenes(prompt, 4):
                assert b.x - a.x > 10 or (abs(a.x - b.x) < 4 and b.y - a.y > 10)


def test_unnamed_colours_take_every_value():
    assert {o.color for scene in scenes(world.parse("two circles"), 40) for o in scene} == set(COLORS)


def test_objects_are_whole_and_each_in_a_quadrant_of_its_own():
    for prompt in EVERY:
        for scene in scenes(prompt, 2):
            assert all(o.radius < min(o.x, o.y, SIZE - o.x, SIZE - o.y) for o in scene)
            assert len({(o.x > SIZE / 2, o.y > SIZE / 2) for o in scene}) == len(scene)
            assert all(max(abs(a.x - b.x), abs(a.y - b.y)) > a.radius + b.radius for a, b in combinations(scene, 2))


def test_the_same_generator_draws_the_same_scene():
    assert scenes(EVERY[50], 5) == scenes(EVERY[50], 5)
    assert len({tuple(scene) for scene in scenes(EVERY[50], 5)}) == 5


def test_pictures_lie_in_the_unit_range_and_leave_the_border_to_the_background():
    images = world.render([scenes(p, 1)[0] for p in EVERY])
    assert images.shape == (len(EVERY), 3, SIZE, SIZE) and images.dtype == torch.float32
    assert images.min() >= 0 and images.max() <= 1
    border = torch.cat([images[:, :, 0], images[:, :, -1], images[..., 0], images[..., -1]], 2)
    assert (border == torch.tensor(world.BACKGROUND)[:, None]).all()


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("color", COLORS)
def test_an_object_has_its_colour_inside_and_the_background_outside(shape, color):
    image = world.render([[world.Object(shape, color, 9.5, 22.5, 5.0)]])[0]
    assert torch.allclose(image[:, 22, 9], torch.tensor(COLORS[color]))
    y, x = torch.meshgrid(torch.arange(SIZE) + 0.5, torch.arange(SIZE) + 0.5, indexing="ij")
    away = torch.maximum((x - 9.5).abs(), (y - 22.5).abs()) > 6
    assert (image[:, away] == torch.tensor(world.BACKGROUND)[:, None]).all()


def test_an_empty_scene_is_the_background():
    assert (world.render([[]]) == torch.tensor(world.BACKGROUND)[None, :, None, None]).all()


def test_a_shape_covers_the_area_that_geometry_says():
    radius, middle = torch.tensor([5.0]), torch.tensor([16.0])
    triangle = 3 * 3**0.5 / 4 * (1.12 * 5) ** 2
    for shape, area in {"circle": torch.pi * 25, "square": 8.8**2, "triangle": triangle, "cross": 2 * 10 * 3.4 - 3.4**2}.items():
        assert world.coverage(shape, middle, middle, radius).sum().item() == pytest.approx(area, rel=0.02)


def test_a_shape_that_the_world_lacks_is_refused():
    with pytest.raises(ValueError, match="'star' is not one of"):
        world.coverage("star", torch.zeros(1), torch.zeros(1), torch.ones(1))
