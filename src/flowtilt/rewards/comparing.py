"""Rewards that compare the images of a prompt: they see all of them at once, on whichever processes they were sampled.

The process that has a prompt's first image judges all of them. All images are rounded to 8 bits first, so that a score does not
depend on whether its image had to travel.
"""

from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from flowtilt.device.placement import on_device
from flowtilt.distributed.world import World
from flowtilt.errors import UserError
from flowtilt.io.images import to_bytes
from flowtilt.io.threads import Background
from flowtilt.prompts import Prompt
from flowtilt.rewards import Reward, modules_of, score
from flowtilt.rewards.facts import facts_of
from flowtilt.rewards.judging import TURNS

PART = 64
"""Images that travel at once."""
Columns = dict[str, Tensor]


def refuse_comparing(rewards: Mapping[str, Reward], key: str) -> None:
    """Raises UserError at a reward that compares the images of a prompt, where each image is to be judged alone.

    Args:
        key: what named the rewards.
    """
    for name, reward in rewards.items():
        if facts_of(name, reward).compares:
            raise UserError(
                f"{key}: {name} compares the images of a prompt within a rollout, so it gives an image alone no score; name another"
            )


def check_groups(rewards: Mapping[str, Reward], per_prompt: int) -> None:
    """Raises UserError where a reward compares the images of a prompt, and there is one of each."""
    comparing = [name for name, reward in rewards.items() if facts_of(name, reward).compares]
    if comparing and per_prompt < 2:
        raise UserError(f"rollout.images_per_prompt: {comparing[0]} compares the images of a prompt; set it to 2 or more")


@dataclass(frozen=True)
class Shares:
    """A rollout over processes.

    Args:
        number: images of all processes, of which each has its share.
        per_prompt: images of each prompt, which are beside each other.
    """

    world: World
    number: int
    per_prompt: int


class Groups:
    """The images of a rollout, by prompt; a part of `rewards.overlapped.Scoring`.

    Args:
        rewards: those that compare.
        device: where they see the images.
        shares: which images this process has.
    """

    def __init__(self, rewards: Mapping[str, Reward], device: torch.device | str, shares: Shares):
        self._rewards, self._device, self._world = rewards, device, shares.world
        self._number, self._size = shares.number, shares.per_prompt
        self._mine = shares.world.share(shares.number)
        self._images: list[Tensor] = []
        self._prompts: list[Prompt] = []
        self._asked: dict[int, Future[Columns]] = {}
        self._away = {name for name, reward in rewards.items() if facts_of(name, reward).off_device}

    def add(self, images: Tensor, prompts: Sequence[Prompt], background: Background | None) -> None:
        """The next of this process's images; prompts that are complete with them are judged in the background where that is possible."""
        self._images += list(to_bytes(images).cpu())
        self._prompts += prompts
        if background and self._away == set(self._rewards):
            for group in self._whole():
                if group not in self._asked and self._rows(group).stop <= len(self._images):
                    self._asked[group] = background.submit(partial(self._judge, group, self._images[self._slice(group)]))

    def finish(self) -> Columns:
        """Scores [n] by column of this process's images.

        Raises:
            UserError: a reward failed.
        """
        travelled = self._exchange()
        found: dict[int, Columns] = {}
        for group in self._own():
            if group in self._asked:
                found[group] = self._asked[group].result()
                continue
            images = [travelled[k] if k in travelled else self._images[k - self._mine.start] for k in self._members(group)]
            found[group] = self._judge(group, images)
        return self._returned(found)

    def _members(self, group: int) -> range:
        """The group's images among those of all processes."""
        return range(group * self._size, min((group + 1) * self._size, self._number))

    def _own(self) -> range:
        """The groups whose first image this process has."""
        return range(-(-self._mine.start // self._size), -(-self._mine.stop // self._size))

    def _rows(self, group: int) -> range:
        """The group's images among those of this process."""
        members = self._members(group)
        return range(members.start - self._mine.start, members.stop - self._mine.start)

    def _slice(self, group: int) -> slice:
        rows = self._rows(group)
        return slice(rows.start, rows.stop)

    def _whole(self) -> list[int]:
        """The groups that this process has all images of."""
        return [group for group in self._own() if self._members(group).stop <= self._mine.stop]

    def _judge(self, group: int, images: Sequence[Tensor]) -> Columns:
        prompt = self._prompts[self._rows(group).start]
        seen = torch.stack(list(images)).float() / 255
        columns: Columns = {}
        for name, reward in self._rewards.items():
            with TURNS, on_device(modules_of(reward), torch.device(self._device)):
                columns |= score({name: reward}, seen.to(self._device), [prompt] * len(seen))[0]
        return columns

    def _exchange(self) -> dict[int, Tensor]:
        """The images [3, H, W] of all groups that several processes share, on every one of them."""
        ends = {self._world.share_of(self._number, rank).stop for rank in range(self._world.size)} - {self._number}
        split = sorted({end // self._size for end in ends if end % self._size})
        wanted = [k for group in split for k in self._members(group)]
        found: dict[int, Tensor] = {}
        for start in range(0, len(wanted), PART):
            part = wanted[start : start + PART]
            buffer = torch.zeros(len(part), *self._images[0].shape, dtype=torch.uint8, device=self._world.device)
            for row, k in enumerate(part):
                if k in self._mine:
                    buffer[row] = self._images[k - self._mine.start].to(buffer.device)
            self._world.sum_([buffer])
            found |= dict(zip(part, buffer.cpu(), strict=True))
        return found

    def _returned(self, found: Mapping[int, Columns]) -> Columns:
        """The scores of this process's images, whoever judged them."""
        names = dict.fromkeys(self._world.gather_json([name for columns in found.values() for name in columns]))
        everywhere: Columns = {}
        for name in names:
            table = torch.zeros(2, self._number, dtype=torch.float32)  # scores, and whether there is one
            for group, columns in found.items():
                if name in columns:
                    rows = slice(self._members(group).start, self._members(group).stop)
                    table[0, rows], table[1, rows] = columns[name].nan_to_num(nan=0.0), (~columns[name].isnan()).float()
            table = table.to(self._world.device)
            self._world.sum_([table])
            scores, known = table.cpu()
            everywhere[name] = scores.masked_fill(known == 0, torch.nan)[self._mine.start : self._mine.stop]
        return everywhere
