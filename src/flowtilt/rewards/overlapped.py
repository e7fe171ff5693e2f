"""A rollout's scores, part by part: what a server judges is on its way while the next part is sampled, or the next rollout."""

from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from functools import partial

import torch
from torch import Tensor

from flowtilt.io.containment import contained
from flowtilt.io.threads import Background
from flowtilt.prompts import Prompt
from flowtilt.rewards import Reward, applies, score
from flowtilt.rewards.comparing import Groups, Shares, refuse_comparing
from flowtilt.rewards.facts import facts_of
from flowtilt.rewards.judging import TURNS, joined, judge

PARTS = 8
"""Parts of a rollout where a reward works off the device: the last part's scores are waited for, the others are not."""


class Scoring:
    """Takes images as they are drawn and gives all scores in the end; a context, so that no request outlives it.

    Rewards in this process share its device with the sampler and wait for the end, or for `here`.

    Args:
        rewards: name -> reward; those with a true `off_device` (a server, the CPU) are asked at once, and those with a true
            `compares` once all images of a prompt are there.
        device: where the others see the images.
        shares: whose images these are, for rewards that compare those of a prompt; without it there may be none.
    """

    def __init__(self, rewards: Mapping[str, Reward], device: torch.device | str = "cpu", shares: Shares | None = None):
        self._device = device
        self._names, self._rewards = list(rewards), rewards
        facts = {name: facts_of(name, reward) for name, reward in rewards.items()}
        comparing = {name: reward for name, reward in rewards.items() if facts[name].compares}
        self._elsewhere = {name: reward for name, reward in rewards.items() if facts[name].off_device and name not in comparing}
        self._local = {name: reward for name, reward in rewards.items() if name not in self._elsewhere and name not in comparing}
        away = any(fact.off_device for fact in facts.values())
        self._background = Background() if away else None
        self._away = away
        if comparing and shares is None:
            refuse_comparing(comparing, "rewards")
        self._groups = Groups(comparing, device, shares) if comparing and shares else None
        self._asked: list[Future[tuple[dict[str, Tensor], list[str]]]] = []
        self._images: list[Tensor] = []
        self._prompts: list[Prompt] = []
        self._here: dict[str, Tensor] = {}

    def __enter__(self) -> "Scoring":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Asks nobody any more, and waits for nothing."""
        if self._background:
            self._background.close()

    def parts(self, number: int) -> Sequence[Tensor]:
        """Rows [n] of each part of `number` images: one part where all rewards are here."""
        return torch.arange(number).split(-(-number // PARTS) if self._away else max(1, number))

    def add(self, images: Tensor, prompts: Sequence[Prompt]) -> None:
        """Images [n, 3, H, W] in [0, 1] of `prompts`."""
        self._prompts += prompts
        if self._local:
            self._images.append(images)
        if self._background and self._elsewhere:
            self._asked.append(self._background.submit(partial(_asked, self._elsewhere, images, list(prompts))))
        if self._groups:
            self._groups.add(images, prompts, self._background)

    def here(self) -> None:
        """Asks the rewards of this process now, and lets go of the images.

        Raises:
            UserError: a reward failed.
        """
        if self._images:
            images = self._images[0] if len(self._images) == 1 else torch.cat(self._images)
            self._here = judge(self._local, images, self._prompts, self._device)[0]
            self._images = []

    def finish(self) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Scores [N] by column, and for each reward where [N] it has none though it applies to the prompt.

        Raises:
            UserError: a reward failed.
        """
        found = joined([future.result()[0] for future in self._asked])
        self.here()
        found |= self._here
        if self._groups:
            found |= self._groups.finish()
        found = {column: found[column] for name in self._names for column in found if column.partition("/")[0] == name}
        with contained("rewards"):
            able = {name: [not applies(self._rewards[name], prompt) for prompt in self._prompts] for name in self._names}
        missing = {name: found[name].isnan() & torch.tensor(able[name], dtype=torch.bool) for name in self._names}
        return found, missing


def _asked(rewards: Mapping[str, Reward], images: Tensor, prompts: list[Prompt]) -> tuple[dict[str, Tensor], list[str]]:
    with TURNS:
        return score(rewards, images, prompts)
