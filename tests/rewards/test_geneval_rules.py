"""GenEval's rules give what the reference's own code gave, and where that was wrong, what follows from the sentences."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flowtilt.errors import UserError
from flowtilt.prompts.geneval_objects import CLASSES, COLORS, RELATIONS, TAGS
from flowtilt.rewards.geneval import judge, kept
from flowtilt.rewards.geneval.metadata import parse
from flowtilt.rewards.geneval.rules import need_color, relations

CASES = json.loads((Path(__file__).parent / "golden" / "geneval_cases.json").read_text())["cases"]
"""Detections and metadata with the answers of the reference code, both of the benchmark and of training."""
OPPOSITE = dict(zip(RELATIONS, ("right of", "left of", "below", "above"), strict=True))
FEW = settings(deadline=None, max_examples=150)


def seen(name, box=(0, 0, 50, 50), score=0.95, color=None):
    return {"class": name, "box": list(box), "score": score, "color": color}


def row(name, number, score=0.95, color=None):
    return [seen(name, (60 * k, 0, 60 * k + 50, 50), score - 0.001 * k, color) for k in range(number)]


def asked(tag, *include, exclude=()):
    return {"tag": tag, "include": [dict(entry) for entry in include]} | ({"exclude": list(exclude)} if exclude else {})


def one(name, count=1, **more):
    return {"class": name, "count": count, **more}


DOG_TIE = asked("position", one("dog"), one("tie", position=["right of", 0]))


# the reference ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", CASES, ids=lambda case: case["name"])
def test_compat_gives_the_reference_s_answers(case):
    want = case["expected"]
    verdict = judge(case["detections"], case["metadata"], compat=True)
    assert (verdict.strict, verdict.correct) == (want["strict_correct"], want["official_correct"])
    assert verdict.score == pytest.approx(want["partial_score"], abs=1e-12)
    assert verdict.reasons == (want["strict_reasons"] or want["official_reasons"])


@pytest.mark.parametrize("case", CASES, ids=lambda case: case["name"])
def test_the_reference_keeps_the_same_objects(case):
    """Best first; of equal scores the reference's order is that of an unstable sort, so it is not looked at."""
    found = kept(case["detections"], case["metadata"]["tag"])
    boxes = {name: [([*d["box"]], d["score"]) for d in group] for name, group in found.items()}
    want = {name: [(row[:4], row[4]) for row in rows] for name, rows in case["expected"]["kept"].items()}
    assert {name: sorted(group) for name, group in boxes.items()} == {
        name: [(box, pytest.approx(score, abs=1e-6)) for box, score in sorted(group)] for name, group in want.items()
    }
    for group in found.values():
        scores = [d["score"] for d in group]
        assert scores == sorted(scores, reverse=True)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case["name"])
def test_strict_and_correct_are_the_same_without_compat(case):
    compat, own = (judge(case["detections"], case["metadata"], compat=compat) for compat in (True, False))
    assert (own.strict, own.correct) == (compat.strict, compat.correct)


def pair(dx, dy=0, side=100):
    """A dog, and a tie whose centre is (dx, dy) from the dog's."""
    return [seen("dog", (300, 300, 300 + side, 300 + side)), seen("tie", (300 + dx, 300 + dy, 300 + dx + side, 300 + dy + side))]


RED_CAR = asked("colors", one("car", color="red"))
GLASSES = asked("counting", one("wine glass", 3), exclude=[one("wine glass", 4)])
TWO = asked("color_attr", one("handbag", color="pink"), one("scissors", color="black"))
BELOW = asked("position", one("dog"), one("tie", position=["below", 0]))
TABLE = {
    "one of one": (row("bowl", 1), asked("single_object", one("bowl")), True, True, 1, 1),
    "two of one": (row("bowl", 2), asked("single_object", one("bowl")), False, True, 0, 0),
    "five of one": (row("bowl", 5), asked("single_object", one("bowl")), False, True, -3, 0),
    "four of three": (row("wine glass", 4), GLASSES, False, False, 2 / 3, 2 / 3),
    "three sure, two unsure": (row("wine glass", 3) + row("wine glass", 2, 0.85), GLASSES, True, True, 1, 1),
    "wrong colour": (row("car", 1, color="blue"), RED_CAR, False, False, 0.5, 0.5),
    "one red, one blue": (row("car", 1, color="red") + row("car", 1, 0.5, "blue"), RED_CAR, False, True, 0, 0),
    "colours swapped": (row("handbag", 1, color="black") + row("scissors", 1, color="pink"), TWO, False, False, 0.5, 0.5),
    "wrong side": (pair(-200), DOG_TIE, False, False, 0.75, 2 / 3),
    "no dog": (pair(200)[1:], DOG_TIE, False, False, 1 / 3, 1 / 3),
    "two dogs": ([*pair(200), seen("dog", (0, 300, 100, 400), 0.5)], DOG_TIE, False, True, 1 / 3, 1 / 3),
    "40 apart": (pair(40), DOG_TIE, False, False, 0.75, 2 / 3),
    "60 apart": (pair(60), DOG_TIE, True, True, 1, 1),
    "diagonal, right": (pair(200, 200), DOG_TIE, True, True, 1, 1),
    "diagonal, below": (pair(200, 200), BELOW, True, True, 1, 1),
    "excluded": (
        row("cat", 1) + row("dog", 1),
        asked("single_object", one("cat"), exclude=[one("dog")]),
        True,
        False,
        1,
        1,
    ),
    # a relation that could not be judged is a part of its own; the reference leaves it out or merges it with the colour's
    "wrong colour, right side": (
        [seen("dog", (0, 0, 50, 50)), seen("tie", (200, 0, 250, 50), color="red")],
        asked("position", one("dog"), one("tie", color="blue", position=["right of", 0])),
        False,
        False,
        2 / 3,
        1 / 2,
    ),
    "no tie of a colour and side": (
        row("dog", 1),
        asked("position", one("dog"), one("tie", color="blue", position=["right of", 0])),
        False,
        False,
        1 / 3,
        1 / 4,
    ),
}


@pytest.mark.parametrize(("detections", "metadata", "strict", "correct", "compat", "score"), TABLE.values(), ids=TABLE)
def test_worked_cases(detections, metadata, strict, correct, compat, score):
    verdict = judge(detections, metadata)
    assert (verdict.strict, verdict.correct) == (strict, correct)
    assert verdict.score == pytest.approx(score)
    assert judge(detections, metadata, compat=True).score == pytest.approx(compat)
    assert (verdict.reasons == []) == (strict and correct)


def test_reasons_say_what_was_seen():
    def reasons(detections, metadata):
        return judge(detections, metadata).reasons

    assert reasons(row("bowl", 2), asked("single_object", one("bowl"))) == ["expected bowl==1, found 2"]
    cars = row("car", 1, color="red") + row("car", 1, color="blue")
    assert reasons(cars, asked("colors", one("car", 2, color="red"))) == ["expected red car==2, found 1 red, 1 blue"]
    assert reasons(row("car", 1), RED_CAR) == ["expected red car==1, found no colour"]
    assert reasons(pair(-200, -200), DOG_TIE) == ["expected tie right of dog, found left of and above"]
    assert reasons(pair(0), DOG_TIE) == ["expected tie right of dog, found neither beside nor above nor below"]
    assert reasons(row("cat", 1) + row("dog", 1), asked("single_object", one("cat"), exclude=[one("dog")])) == ["expected dog<1, found 1"]


# thresholds ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tag", TAGS)
def test_a_score_must_exceed_the_threshold_in_single_precision(tag):
    least = np.float32(0.9 if tag == "counting" else 0.3)
    above = np.nextafter(least, np.float32(1), dtype=np.float32)
    for score, count in ((float(least), 0), (least, 0), (0.9 if tag == "counting" else 0.3, 0), (above, 1), (float(above), 1)):
        assert len(kept([seen("dog", score=score)], tag)) == count


def test_at_most_sixteen_of_a_class_are_kept_the_best():
    group = [seen("cup", score=0.95 - 0.01 * k) for k in range(20)]
    found = kept(group[::-1] + row("dog", 3), "colors")
    assert found["cup"] == group[:16] and len(found["dog"]) == 3


def test_of_equal_scores_the_later_comes_first():
    first, second = seen("cup", (0, 0, 1, 1)), seen("cup", (1, 1, 2, 2))
    assert kept([first, second], "colors")["cup"] == [second, first]


# relations -------------------------------------------------------------------------------------------

corner = st.integers(0, 400)
side = st.integers(1, 200)
boxes = st.builds(lambda x, y, w, h: (x, y, x + w, y + h), corner, corner, side, side)


@FEW
@given(a=boxes, b=boxes)
def test_relations_turn_round_with_their_boxes(a, b):
    assert {OPPOSITE[relation] for relation in relations(a, b)} == set(relations(b, a))


@FEW
@given(a=boxes, b=boxes)
def test_relations_of_mirrored_boxes_are_mirrored(a, b):
    def mirrored(box):
        return (-box[2], box[1], -box[0], box[3])

    swapped = {"left of": "right of", "right of": "left of"}
    assert {swapped.get(relation, relation) for relation in relations(a, b)} == set(relations(mirrored(a), mirrored(b)))


@FEW
@given(a=boxes, b=boxes)
def test_relations_never_contradict(a, b):
    found = relations(a, b)
    assert len(found) <= 2 and not any(OPPOSITE[relation] in found for relation in found)


@pytest.mark.parametrize(("distance", "holds"), [(20, False), (40, False), (41, True), (-40, False), (-41, True)])
def test_beside_begins_where_a_fifth_of_the_sides_is_half_of_the_distance(distance, holds):
    """Boxes 100 wide: (d - 20) / d > 1/2 from d = 40 on."""
    want = ["right of" if distance > 0 else "left of"] if holds else []
    assert relations((distance, 0, distance + 100, 100), (0, 0, 100, 100)) == want


@pytest.mark.parametrize(("degrees", "want"), [(0, ["right of"]), (29, ["right of"]), (45, ["right of", "below"]), (61, ["below"])])
def test_small_boxes_are_beside_up_to_sixty_degrees(degrees, want):
    """Without sides the rule is |cos| > 1/2 and |sin| > 1/2; image y grows downward."""
    x, y = 1000 * math.cos(math.radians(degrees)), 1000 * math.sin(math.radians(degrees))
    assert relations((x, y, x, y), (0, 0, 0, 0)) == want


def test_boxes_may_be_numpy_s_unsigned_integers():
    a, b = np.array([0, 0, 50, 50], np.uint8), np.array([200, 0, 250, 50], np.uint8)
    assert relations(a, b) == ["left of"]
    assert judge([seen("tie", score=np.float32(0.9)) | {"box": b}, seen("dog") | {"box": a}], DOG_TIE).strict


def test_relations_may_form_a_chain_in_any_direction():
    objects = [seen("cat", (0, 0, 50, 50)), seen("dog", (200, 0, 250, 50)), seen("tie", (400, 0, 450, 50))]
    onward = asked("position", one("cat", position=["left of", 1]), one("dog", position=["left of", 2]), one("tie"))
    back = asked("position", one("tie"), one("dog", position=["left of", 0]), one("cat", position=["left of", 1]))
    for metadata in (onward, back):
        assert judge(objects, metadata).strict
        # without the tie the dog has no target, and the cat none that is right
        verdict = judge(objects[:2], metadata)
        assert len(verdict.reasons) == 3 and verdict.score == pytest.approx(2 / 5)


def test_every_object_must_stand_so_to_every_target():
    metadata = asked("position", one("dog", 2), one("tie", 2, position=["right of", 0]))
    dogs = [seen("dog", (0, 0, 50, 50)), seen("dog", (100, 0, 150, 50))]
    ties = [seen("tie", (300, 0, 350, 50)), seen("tie", (400, 0, 450, 50))]
    between = seen("tie", (50, 0, 100, 50))
    assert judge(dogs + ties, metadata).strict
    assert judge([*dogs, ties[0], between], metadata).score == pytest.approx(2 / 3)


# invariants ------------------------------------------------------------------------------------------

NAMES = ("dog", "tie", "car")
name = st.sampled_from(NAMES)


@st.composite
def scenes(draw):
    """A few detections whose scores all differ, and metadata that asks for some of them."""
    count = draw(st.integers(0, 6))
    scores = draw(st.lists(st.integers(1, 99), min_size=count, max_size=count, unique=True))
    colors = st.sampled_from((None, "red", "blue"))
    detections = [seen(draw(name), draw(boxes), score / 100, draw(colors)) for score in scores]
    entries = []
    for k in range(draw(st.integers(1, 3))):
        more = {"color": draw(st.sampled_from(("red", "blue")))} if draw(st.booleans()) else {}
        if k and draw(st.booleans()):
            more["position"] = [draw(st.sampled_from(RELATIONS)), draw(st.integers(0, k - 1))]
        entries.append(one(draw(name), draw(st.integers(1, 3)), **more))
    exclude = [one(draw(name), draw(st.integers(1, 4)))] if draw(st.booleans()) else []
    return detections, asked(draw(st.sampled_from(TAGS)), *entries, exclude=exclude)


@FEW
@given(scene=scenes(), data=st.data(), compat=st.booleans())
def test_the_order_of_detections_does_not_matter(scene, data, compat):
    detections, metadata = scene
    assert judge(data.draw(st.permutations(detections)), metadata, compat) == judge(detections, metadata, compat)


@FEW
@given(scene=scenes(), number=st.integers(1, 5), compat=st.booleans())
def test_what_is_below_the_threshold_does_not_matter(scene, number, compat):
    detections, metadata = scene
    more = [seen(name, score=0.3) for name in NAMES] * number
    assert judge(detections + more, metadata, compat) == judge(detections, metadata, compat)


@FEW
@given(scene=scenes())
def test_the_score_is_a_share_and_whole_just_where_all_is_right(scene):
    verdict = judge(*scene)
    assert 0 <= verdict.score <= 1
    assert verdict.strict == (verdict.score == 1)
    assert verdict.correct or not verdict.strict or "exclude" in scene[1]
    assert (verdict.reasons == []) == (verdict.strict and verdict.correct)


@FEW
@given(scene=scenes())
def test_other_keys_and_the_order_of_keys_do_not_matter(scene):
    detections, metadata = scene

    def dressed(record):
        return {"more": [1], **dict(reversed(record.items())), "other": None}

    changed = dressed(metadata) | {key: [dressed(entry) for entry in metadata.get(key, [])] for key in ("include", "exclude")}
    assert judge([dressed(d) for d in detections], changed) == judge(detections, metadata)


@FEW
@given(scene=scenes())
def test_only_colours_that_a_verdict_depends_on_are_asked_for(scene):
    detections, metadata = scene
    needed = need_color(detections, metadata)
    blank = [d if any(d is other for other in needed) else d | {"color": None} for d in detections]
    for compat in (False, True):
        assert judge(blank, metadata, compat) == judge(detections, metadata, compat)


def test_no_colour_is_asked_for_where_there_are_too_few_objects_and_of_the_best_where_there_are_many():
    cars = row("car", 3) + row("dog", 2) + row("car", 1, 0.2)
    assert need_color(cars, asked("colors", one("car", 4, color="red"))) == []
    assert need_color(cars, asked("colors", one("car", 2, color="red"), one("dog"))) == cars[:2]
    assert need_color(cars, asked("colors", one("car", 2, color="red"), one("car", 3, color="blue"))) == cars[:3]


def test_nothing_asked_for_scores_nothing():
    assert judge(row("dog", 1), {"tag": "colors", "include": []}).score == 0


def test_the_vocabulary_has_its_sizes_and_no_name_twice():
    assert len(set(CLASSES)) == 80 and len(set(COLORS)) == 10 and len(TAGS) == 6
    # COCO's own numbering: 16 dog, 32 sports ball, 62 tv; renamed are mouse, remote, keyboard
    assert [CLASSES[k] for k in (16, 32, 62, 64, 65, 66, 79)] == [
        "dog",
        "sports ball",
        "tv",
        "computer mouse",
        "tv remote",
        "computer keyboard",
        "toothbrush",
    ]


# faults ----------------------------------------------------------------------------------------------

FAULTS = {
    "no tag": ([], {"include": []}, "tag"),
    "unknown tag": ([], {"tag": "colour", "include": []}, '"colors"'),
    "no object": ([], ["tag"], "metadata"),
    "include a mapping": ([], {"tag": "colors", "include": {}}, "include"),
    "include a text": ([], {"tag": "colors", "include": "dog"}, "include"),
    "an entry a number": ([], {"tag": "colors", "include": [3]}, "include[0]"),
    "COCO's own name": (
        [],
        asked("colors", one("dog"), one("mouse")),
        'include[1].class: "mouse" is unknown; did you mean "computer mouse"?',
    ),
    "class a list": ([], asked("colors", one(["dog"])), "include[0].class"),
    "unknown class excluded": ([], asked("colors", one("dog"), exclude=[one("dgo")]), 'exclude[0].class: "dgo" is unknown'),
    "no count": ([], asked("colors", {"class": "dog"}), "include[0].count: missing"),
    "count 0": ([], asked("colors", one("dog", 0)), "include[0].count"),
    "count a text": ([], asked("colors", one("dog", "1")), "include[0].count"),
    "count true": ([], asked("colors", one("dog", True)), "include[0].count"),
    "half a dog": ([], asked("colors", one("dog", 0.5)), "include[0].count"),
    "unknown colour": ([], asked("colors", one("dog", color="grey")), "include[0].color"),
    "unknown relation": ([], asked("position", one("dog"), one("tie", position=["under", 0])), "include[1].position"),
    "relation alone": ([], asked("position", one("dog"), one("tie", position="below")), "include[1].position"),
    "index beyond": ([], asked("position", one("dog"), one("tie", position=["below", 2])), "include[1].position: 2"),
    "index below": ([], asked("position", one("dog"), one("tie", position=["below", -1])), "include[1].position: -1"),
    "index a text": ([], asked("position", one("dog"), one("tie", position=["below", "0"])), "include[1].position"),
    "to itself": ([], asked("position", one("dog"), one("tie", position=["below", 1])), "circle"),
    "in a circle": ([], asked("position", one("dog", position=["above", 1]), one("tie", position=["below", 0])), "circle"),
    "detection a list": ([[1]], RED_CAR, "detections[0]"),
    "detection of no class": ([{"score": 1.0, "box": [0, 0, 1, 1]}], RED_CAR, "detections[0].class: missing"),
    "detection of an unknown class": ([*row("car", 1), seen("lorry")], RED_CAR, "detections[1].class"),
    "detection of an unknown colour": ([seen("car", color="grey")], RED_CAR, "detections[0].color"),
    "score NaN": ([seen("car", score=math.nan)], RED_CAR, "detections[0].score"),
    "no score": ([{"class": "car", "box": [0, 0, 1, 1]}], RED_CAR, "detections[0].score: missing"),
    "box of three": ([seen("car", (1, 2, 3))], RED_CAR, "detections[0].box"),
    "box of texts": ([seen("car", "1234")], RED_CAR, "detections[0].box"),
    "no box": ([{"class": "car", "score": 0.9}], RED_CAR, "detections[0].box: missing"),
}


@pytest.mark.parametrize(("detections", "metadata", "says"), FAULTS.values(), ids=FAULTS)
def test_a_fault_is_named_in_one_line(detections, metadata, says):
    with pytest.raises(UserError) as caught:
        judge(detections, metadata)
    assert says in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("count", [10**400, 1001, 0, -1, 1e400, float("nan"), "2"])
def test_a_count_that_no_image_can_show_is_refused_in_one_line(count):
    with pytest.raises(UserError, match=r"include\[0\]\.count: .* it is a whole number from 1 to 1000") as caught:
        parse({"tag": "counting", "include": [{"class": "dog", "count": count}]})
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 200


def test_numbers_of_thousands_of_digits_and_deep_lists_are_refused_in_one_line():
    deep: list = []
    for _ in range(100_000):
        deep = [deep]
    for value in (10**5000, deep):
        with pytest.raises(UserError, match=r"count: this (int|list) will not do"):
            parse({"tag": "counting", "include": [{"class": "dog", "count": value}]})
