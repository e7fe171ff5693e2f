"""Prompts, the files they come from, and the order in which training meets them."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from flowtilt.errors import UserError
from flowtilt.seeding import generator


@dataclass(frozen=True)
class Prompt:
    """A caption and what a reward may need to judge it.

    Args:
        text: the caption that the model reads.
        tag: the kind of prompt ("counting", "position", …); "" where the source names none.
        metadata: everything else of the source's line; GenEval's `include`, `exclude`.
    """

    text: str
    tag: str = ""
    metadata: Mapping[str, Any] = field(default_factory=dict, hash=False)


def load_prompts(path: str | Path) -> list[Prompt]:
    """Reads prompts from a text file (one a line) or from JSON lines with a "prompt" key.

    Blank lines are skipped, surrounding spaces removed, repeated captions kept once.

    Raises:
        UserError: the file is missing, empty, not UTF-8, or a JSON line has no "prompt".
    """
    path = Path(path)
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")  # splitlines would also cut at U+2028 and U+0085, inside a caption
    except UnicodeDecodeError as error:
        raise UserError(f"prompts {path}: byte {error.start} is not UTF-8; save the file as UTF-8") from None
    except OSError as error:
        raise UserError(f"prompts {path}: {error.strerror}; give a text or .jsonl file") from None
    found: dict[str, Prompt] = {}
    for number, line in enumerate(lines, 1):
        if line.strip():
            prompt = _from_json(line, f"{path}:{number}") if path.suffix == ".jsonl" else Prompt(line.strip())
            found.setdefault(prompt.text, prompt)
    if not found:
        raise UserError(f"prompts {path}: no prompt in the file; write one a line")
    return list(found.values())


def _from_json(line: str, where: str) -> Prompt:
    try:
        record = json.loads(line)
    except json.JSONDecodeError as error:
        raise UserError(f"prompts {where}: not JSON ({error.msg}); write one object a line") from None
    if not isinstance(record, dict) or not isinstance(record.get("prompt"), str) or not record["prompt"].strip():
        raise UserError(f'prompts {where}: no "prompt" text; write {{"prompt": "…"}} on each line')
    rest = {key: value for key, value in record.items() if key not in ("prompt", "tag")}
    tag = record.get("tag")
    return Prompt(record["prompt"].strip(), "" if tag is None else str(tag), rest)


@dataclass(frozen=True)
class PromptWalk:
    """An endless, seeded walk through prompts, without replacement within a pass.

    Tags take turns, so a tag of few prompts is met as often as one of many; prompts without tags are
    one tag. The walk is a pure function of the position: its state is one integer.
    """

    prompts: Sequence[Prompt]
    seed: int

    def draw(self, position: int, count: int) -> list[Prompt]:
        """The prompts at `position` … `position + count - 1`; distinct where the tags' passes allow it."""
        tags = list(dict.fromkeys(p.tag for p in self.prompts))
        by_tag = [[p for p in self.prompts if p.tag == tag] for tag in tags]
        drawn = []
        for k in range(position, position + count):
            members = by_tag[k % len(tags)]
            turn = k // len(tags)
            cycle, place = divmod(turn, len(members))
            order = torch.randperm(len(members), generator=generator(self.seed, "prompts", k % len(tags), cycle))
            drawn.append(members[int(order[place])])
        return drawn
