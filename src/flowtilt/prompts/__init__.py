"""Prompts, the files and published sets they come from, and the order in which training meets them."""

from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import accumulate

import torch

from flowtilt.errors import UserError
from flowtilt.prompts.files import load_prompts
from flowtilt.prompts.prompt import Caption, Edit, Prompt
from flowtilt.seeding import generator

__all__ = ["Caption", "Edit", "Prompt", "PromptWalk", "load_prompts"]


@dataclass(frozen=True)
class PromptWalk:
    """An endless, seeded walk through prompts, without replacement within a pass.

    Tags take turns, so a tag of few prompts is met as often as one of many; prompts without tags are
    one tag. The walk is a pure function of the position: its state is one integer.

    Args:
        turns: of each tag in a round; 1 where it is not named, 0 leaves it out.

    Raises:
        UserError: `turns` names a tag that no prompt has, or leaves none.
    """

    prompts: Sequence[Prompt]
    seed: int
    turns: Mapping[str, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        tags = {p.tag for p in self.prompts}
        unknown = [tag for tag, turns in self.turns.items() if turns and tag not in tags]
        if unknown:
            raise UserError(f"tags.{unknown[0]}: no prompt has this tag; they have {', '.join(sorted(tags)) or 'none'}")
        if all(self.turns.get(tag, 1) == 0 for tag in tags):
            raise UserError("tags: no tag is left")

    def take(self, position: int, count: int) -> list[Prompt]:
        """The prompts at `position` … `position + count - 1`; distinct where the tags' passes allow it."""
        tags = list(dict.fromkeys(p.tag for p in self.prompts))
        by_tag = [[p for p in self.prompts if p.tag == tag] for tag in tags]
        turns = [self.turns.get(tag, 1) for tag in tags]
        ends = list(accumulate(turns))
        taken = []
        for k in range(position, position + count):
            done, slot = divmod(k, ends[-1])
            number = bisect_right(ends, slot)
            turn = done * turns[number] + slot - (ends[number] - turns[number])
            cycle, place = divmod(turn, len(by_tag[number]))
            order = torch.randperm(len(by_tag[number]), generator=generator(self.seed, "prompts", number, cycle))
            taken.append(by_tag[number][int(order[place])])
        return taken
