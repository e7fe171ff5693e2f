"""GenEval's rules: what was detected in an image against what its prompt asks for (arXiv 2310.11513).

The benchmark counts an image as correct if every object is there; the reward of Flow-GRPO and DiffusionNFT
wants exact counts and gives partial credit. Both are judged from the same detections. A detection is a
mapping with "class", "score", "box" (x1, y1, x2, y2 in pixels, y downward) and "color", one of ten or None.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from flowtilt.prompts.geneval_objects import CLASSES, COLORS, RELATIONS
from flowtilt.rewards.geneval.metadata import Entry, Request, name_among, parse, real, wrong

MOST = 16
"""Objects of one class that are kept."""
MARGIN = 0.1
"""Share of two boxes' sides by which their distance is reduced before it makes a relation."""
STEEPNESS = 0.5
"""Least share of the distance that must lie along a relation's axis."""


@dataclass(frozen=True)
class Verdict:
    """The judgement of one image.

    Args:
        correct: the benchmark's rule: at least the number asked for, and nothing excluded.
        strict: the training rule: exactly the number asked for; `exclude` is not looked at.
        score: mean share of what is right, in [0, 1]; with `compat` it may be negative.
        reasons: what fails the training rule, or, where nothing does, the benchmark's; empty where both hold.
    """

    correct: bool
    strict: bool
    score: float
    reasons: list[str]


def judge(detections: Sequence[Mapping[str, Any]], metadata: Mapping[str, Any], compat: bool = False) -> Verdict:
    """Judges an image by its detections, from which the thresholds have yet to select.

    The score is the mean over one part for each entry's number, colour and relation. With `compat` it is
    what the training code of Flow-GRPO and DiffusionNFT computes: the part of a number falls below 0, a
    wrong relation counts as half right, and some parts that can't be judged are left out.

    Args:
        metadata: a line of GenEval's metadata: "tag", "include" and perhaps "exclude".

    Raises:
        UserError: an unknown tag, class, colour or relation, a wrong type, an index that points nowhere.
    """
    request = parse(metadata)
    objects = kept(detections, request.tag)
    reasons, parts = _compare(request, objects, exact=True, compat=compat)
    lenient, _ = _compare(request, objects, exact=False, compat=compat)
    for entry in request.exclude:
        number = len(objects.get(entry.name, ()))
        if number >= entry.count:
            lenient.append(f"expected {entry.name}<{entry.count}, found {number}")
    score = sum(parts) / len(parts) if parts else 0.0
    return Verdict(correct=not lenient, strict=not reasons, score=score, reasons=reasons or lenient)


def threshold(tag: str) -> float:
    """The score, fp32, that an object's must exceed."""
    return 0.9 if tag == "counting" else 0.3


def kept(detections: Sequence[Mapping[str, Any]], tag: str) -> dict[str, list[Mapping[str, Any]]]:
    """The detections above the tag's threshold by class, at most 16 of each, best first; of equal ones, the later first.

    Raises:
        UserError: a detection with an unknown class or colour, or without a finite score and box.
    """
    least = np.float32(threshold(tag))
    found: dict[str, list[tuple[np.float32, int, Mapping[str, Any]]]] = {}
    for index, detection in enumerate(detections):
        score = _check_detection(detection, f"detections[{index}]")
        if score > least:
            found.setdefault(detection["class"], []).append((score, index, detection))
    return {name: [d for *_, d in sorted(group, key=lambda one: one[:2], reverse=True)[:MOST]] for name, group in found.items()}


def need_color(detections: Sequence[Mapping[str, Any]], metadata: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """The detections whose "color" a verdict depends on: of a class with a colour, the best ones if there are enough of them."""
    request = parse(metadata)
    objects = kept(detections, request.tag)
    needed: dict[int, Mapping[str, Any]] = {}
    for entry in request.include:
        group = objects.get(entry.name, [])
        if entry.color and len(group) >= entry.count:
            needed |= {id(detection): detection for detection in group[: entry.count]}
    return list(needed.values())


def relations(a: Sequence[float], b: Sequence[float]) -> list[str]:
    """How box a stands to box b: none, one, or two relations where it is diagonal.

    On each axis the centres' offset is reduced by a tenth of the two sides; a relation holds where what is
    left is more than half of the whole offset's length.
    """
    a, b = ([float(side) for side in box] for box in (a, b))  # differences of numpy's unsigned integers would wrap around
    offset, rest = [], []
    for axis in (0, 1):
        difference = (a[axis] + a[axis + 2]) / 2 - (b[axis] + b[axis + 2]) / 2
        sides = a[axis + 2] - a[axis] + b[axis + 2] - b[axis]
        offset.append(difference)
        rest.append(math.copysign(max(abs(difference) - MARGIN * sides, 0.0), difference))
    if max(abs(rest[0]), abs(rest[1])) < 1e-3:
        return []
    x, y = (value / math.hypot(*offset) for value in rest)
    holds = (x < -STEEPNESS, x > STEEPNESS, y < -STEEPNESS, y > STEEPNESS)
    return [relation for relation, does in zip(RELATIONS, holds, strict=True) if does]


def _compare(
    request: Request, objects: Mapping[str, list[Mapping[str, Any]]], *, exact: bool, compat: bool
) -> tuple[list[str], list[float]]:
    """Reasons and score parts of all entries, in their order."""
    groups: dict[int, list[Mapping[str, Any]] | None] = {}
    reasons: dict[int, list[str]] = {}
    parts: dict[int, list[float]] = {}
    for index in request.order:
        entry = request.include[index]
        found = objects.get(entry.name, [])
        found = found if exact else found[: entry.count]
        reasons[index], parts[index] = _number_and_color(entry, found, exact=exact, compat=compat)
        if entry.position and not reasons[index]:
            target = request.include[entry.position[1]]
            why, more = _relation(entry, found, target.name, groups[entry.position[1]], compat=compat)
            reasons[index] += why
            parts[index] += more
        groups[index] = None if reasons[index] else found
    each = range(len(request.include))
    return [reason for index in each for reason in reasons[index]], [part for index in each for part in parts[index]]


def _number_and_color(entry: Entry, found: Sequence[Mapping[str, Any]], *, exact: bool, compat: bool) -> tuple[list[str], list[float]]:
    number = 1 - abs(entry.count - len(found)) / entry.count
    parts = [number if compat else max(number, 0.0)]
    relation = entry.position is not None
    if len(found) != entry.count:
        asked = (entry.color is not None) + relation
        sign = "==" if exact else ">="
        return [f"expected {entry.name}{sign}{entry.count}, found {len(found)}"], parts + [0.0] * (min(asked, 1) if compat else asked)
    if entry.color is None:
        return [], parts
    colors = [detection.get("color") for detection in found]
    right = colors.count(entry.color)
    parts.append(right / entry.count)
    if right == entry.count:
        return [], parts
    if relation and not compat:
        parts.append(0.0)
    seen = ", ".join(f"{colors.count(color)} {color}" for color in COLORS if color in colors)
    if compat:
        return [f"expected {entry.color} {entry.name}>={entry.count}, found {right} {entry.color}; and {seen}"], parts
    sign = "==" if exact else ">="
    return [f"expected {entry.color} {entry.name}{sign}{entry.count}, found {seen or 'no colour'}"], parts


def _relation(
    entry: Entry, found: Sequence[Mapping[str, Any]], name: str, targets: Sequence[Mapping[str, Any]] | None, *, compat: bool
) -> tuple[list[str], list[float]]:
    """Every object to every target; `targets` is None where they are not as they should be."""
    relation = entry.position[0] if entry.position else ""
    if targets is None:
        return [f"no target for {entry.name} to be {relation}"], [0.0]
    for a in found:
        for b in targets:
            holds = relations(a["box"], b["box"])
            if relation in holds:
                continue
            seen = " and ".join(holds)
            if compat:
                return [f"expected {entry.name} {relation} target, found {seen} target"], [0.0, 1.0]
            return [f"expected {entry.name} {relation} {name}, found {seen or 'neither beside nor above nor below'}"], [0.0]
    return [], [1.0]


def _check_detection(detection: Any, place: str) -> np.float32:
    """The score of a well-formed detection."""
    if not isinstance(detection, Mapping):
        raise wrong(place, detection, 'an object with "class", "score", "box" and "color"')
    name_among(CLASSES, detection.get("class"), f"{place}.class")
    if detection.get("color") is not None:
        name_among(COLORS, detection["color"], f"{place}.color")
    box, score = detection.get("box"), detection.get("score")
    if not isinstance(box, Sequence | np.ndarray) or len(box) != 4 or not all(real(side) for side in box):
        raise wrong(f"{place}.box", box, "four numbers: x1, y1, x2, y2 in pixels")
    if not real(score):
        raise wrong(f"{place}.score", score, "a number")
    return np.float32(score)
