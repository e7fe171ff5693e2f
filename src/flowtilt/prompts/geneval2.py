"""GenEval 2's prompt file (CC BY-NC 4.0, which flowtilt neither has nor fetches): what its lines hold, and prompts of its form.

A line: prompt, atom_count, vqa_list [[question, answer], ...], skills [one per question].
"""

import json
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch

from flowtilt.errors import UserError
from flowtilt.prompts.prompt import Prompt
from flowtilt.seeding import generator

THINGS = (
    *("apple", "backpack", "ball", "banana", "bear", "bench", "bicycle", "bird", "boat", "book", "bottle", "bowl"),
    *("bus", "cake", "car", "cat", "chair", "clock", "cow", "cup", "dog", "donut", "elephant", "fork"),
    *("giraffe", "horse", "kite", "lamp", "laptop", "motorcycle", "orange", "pizza", "rabbit", "sheep", "sofa", "spoon"),
    *("suitcase", "table", "teddy bear", "train", "truck", "umbrella", "vase", "zebra"),
)
LOOKS = (
    *("red", "blue", "green", "yellow", "purple", "pink", "white", "black", "brown", "gray"),
    *("wooden", "metal", "plastic", "glass", "striped", "spotted"),
)
RELATIONS = ("to the left of", "to the right of", "above", "below", "in front of", "behind")
COUNTS = ("two", "three", "four", "five", "six", "seven")
ATOMS = (3, 10)
"""The least and the most parts of a prompt."""


def tag_of(record: Mapping[str, Any]) -> str:
    """The tag of a line with GenEval 2's questions, its number of parts; "" for any other line."""
    count = record.get("atom_count")
    return f"{count} atoms" if isinstance(count, int) and not isinstance(count, bool) and record.get("vqa_list") else ""


def generate(number: int, seed: int, exclude: Collection[str] = ()) -> list[Prompt]:
    """So many different prompts with questions, of 3 to 10 parts in turn, drawn by a seed. They are not the benchmark's.

    Args:
        exclude: captions that are left out, such as the benchmark's.

    Raises:
        UserError: there are not so many.
    """
    found: dict[str, Prompt] = {}
    taken = set(exclude)
    for k in range(20 * number + 100):
        if len(found) == number:
            break
        prompt = _prompt(seed, k, ATOMS[0] + len(found) % (ATOMS[1] - ATOMS[0] + 1))
        if prompt.text not in taken:
            taken.add(prompt.text)
            found[prompt.text] = prompt
    if len(found) < number:
        raise UserError(f"prompts: {number} prompts of this form are too many; ask for fewer")
    return list(found.values())


def to_lines(prompts: Sequence[Prompt]) -> str:
    """JSON lines with the benchmark's keys."""
    return "".join(json.dumps({"prompt": prompt.text, **prompt.metadata}) + "\n" for prompt in prompts)


def _prompt(seed: int, index: int, atoms: int) -> Prompt:
    """One prompt: each thing is a part, and so are its look, its number beyond one, and its place beside the thing before."""
    draws = torch.rand(64, generator=generator(seed, "geneval2 prompts", index), dtype=torch.float64).tolist()
    things = [THINGS[k] for k in torch.randperm(len(THINGS), generator=generator(seed, "geneval2 things", index)).tolist()]
    phrases: list[str] = []
    questions: list[tuple[str, str, str]] = []
    before, left = "", atoms
    while left > 0:
        thing, mine = things[len(phrases)], draws[4 * len(phrases) : 4 * len(phrases) + 4]
        left -= 1
        look = LOOKS[int(mine[0] * len(LOOKS))] if left and mine[1] < 0.7 else ""
        left -= bool(look)
        count = COUNTS[int(mine[2] * 2 * len(COUNTS))] if left and mine[2] < 0.5 else ""
        left -= bool(count)
        relation = RELATIONS[int(mine[3] * len(RELATIONS))] if left and before else ""
        left -= bool(relation)
        named, verb = (plural(thing), "Are") if count else (thing, "Is")
        questions.append((f"Is there a {thing} in the image?", "Yes", "object"))
        questions.append((f"How many {plural(thing)} are in the image?", count or "one", "count"))
        questions += [(f"{verb} the {named} {look}?", "Yes", "attribute")] if look else []
        questions += [(f"{verb} the {named} {relation} the {before}?", "Yes", "position")] if relation else []
        phrase = " ".join(filter(None, (count or _article(look or thing), look, named)))
        phrases.append(f"{phrase} {relation} the {before}" if relation else phrase)
        before = " ".join(filter(None, (look, named)))
    metadata = {
        "atom_count": atoms,
        "vqa_list": [[question, answer] for question, answer, _ in questions],
        "skills": [skill for _, _, skill in questions],
    }
    return Prompt(_joined(phrases), tag_of(metadata), metadata)


def plural(thing: str) -> str:
    """The plural of one of the things."""
    return {"sheep": "sheep"}.get(thing, thing + ("es" if thing.endswith(("s", "ch")) else "s"))


def _article(word: str) -> str:
    return "an" if word[0] in "aeiou" else "a"


def _joined(phrases: Sequence[str]) -> str:
    """a, b, and c."""
    return phrases[0] if len(phrases) == 1 else f"{', '.join(phrases[:-1])}, and {phrases[-1]}"
