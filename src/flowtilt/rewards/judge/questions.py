"""The questions of a prompt about its image, from its line in the prompt file."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from flowtilt.errors import UserError
from flowtilt.prompts import Prompt

KEYS = ("questions", "vqa_list")
"""Where a line may have them; the second is GenEval 2's."""


@dataclass(frozen=True)
class Question:
    """One thing to see in an image, and the answer that is right.

    Args:
        skill: what it is about; "" where the file names none.
    """

    text: str
    answer: str = "Yes"
    skill: str = ""


def questions_of(prompt: Prompt) -> list[Question]:
    """A prompt's questions: texts, whose right answer is yes, or pairs [question, answer]; [] where it has none.

    Raises:
        UserError: they are something else; names the line.
    """
    key = next((key for key in KEYS if prompt.metadata.get(key)), None)
    if key is None:
        return []
    entries, skills = prompt.metadata[key], prompt.metadata.get("skills", ())
    if not _is_list(entries):
        raise _wrong(prompt, f"{key} is {_shown(entries)}")
    named: Sequence[Any] = skills if _is_list(skills) else ()
    if len(named) != len(entries) or not all(isinstance(one, str) for one in named):
        named = [""] * len(entries)
    return [_question(prompt, f"{key}[{i}]", entry, named[i]) for i, entry in enumerate(entries)]


def _question(prompt: Prompt, place: str, entry: Any, skill: str) -> Question:
    parts = [entry] if isinstance(entry, str) else entry
    if not _is_list(parts) or not 1 <= len(parts) <= 2 or not all(isinstance(part, str) and part.strip() for part in parts):
        raise _wrong(prompt, f"{place} is {_shown(entry)}")
    return Question(*parts, skill=skill)


def _is_list(value: Any) -> bool:
    return isinstance(value, Sequence) and not isinstance(value, str)


def _shown(value: Any) -> str:
    try:
        text = json.dumps(value, ensure_ascii=False, default=repr)
    except (ValueError, RecursionError):
        text = type(value).__name__
    return text if len(text) <= 60 else text[:57] + "…"


def _wrong(prompt: Prompt, what: str) -> UserError:
    place = f"prompts {prompt.where}" if prompt.where else f'prompt "{prompt.text}"'
    return UserError(f'{place}: {what}; want a list of questions, each a text or ["question", "answer"]')
