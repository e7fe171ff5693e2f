"""Rewards are tried once before a run, so that a wrong shape or a typing error costs seconds and not an evaluation."""

from collections.abc import Mapping, Sequence
from itertools import islice

import torch

from flowtilt.prompts import Prompt
from flowtilt.rewards import Reward, applies
from flowtilt.rewards.facts import facts_of
from flowtilt.rewards.judging import judge
from flowtilt.seeding import generator


def preflight(rewards: Mapping[str, Reward], prompts: Sequence[Prompt], *, side: int, device: torch.device | str, seed: int) -> None:
    """Calls each reward once with two images of noise and the first two prompts that it applies to.

    Left out are those that apply to no prompt, and those with a true `off_device`: a server has proved itself
    when it was found, every call of it may cost money, and a judge may well refuse to mark noise.

    Args:
        prompts: the run's own.
        side: height and width of the run's images in pixels.
        device: where the run's images are.

    Raises:
        UserError: a reward raises, returns another shape or an infinity, or changes the images.
    """
    noise = torch.rand(2, 3, side, side, generator=generator(seed, "trial"))
    for name, reward in rewards.items():
        if facts_of(name, reward).off_device:
            continue
        able = list(islice((prompt for prompt in prompts if not applies(reward, prompt)), 2))
        if able:
            judge({name: reward}, noise.clone(), [able[0], able[-1]], device)
