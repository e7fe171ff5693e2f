"""Prompts, the files and published sets they come from, and the order in which training meets them."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from flowtilt.prompts.files import load_prompts
from flowtilt.prompts.prompt import Prompt
from flowtilt.seeding import generator

__all__ = ["Prompt", "PromptWalk", "load_prompts"]


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
