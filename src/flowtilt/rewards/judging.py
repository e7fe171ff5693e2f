"""Many images before their rewards: part by part on the device, models that wait elsewhere coming for their turn."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from flowtilt.device.placement import on_device
from flowtilt.io.threads import Turns
from flowtilt.prompts import Prompt
from flowtilt.rewards import Reward, modules_of, score

PART = 64
"""Images that are on the device at once."""
TURNS = Turns()
"""Whose turn it is to ask rewards: users' code is asked by one thread at a time, be it for a rollout or for an evaluation."""


def joined(parts: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """The columns of all parts, one part after the other; a part has NaN in a column that it lacks."""
    lengths = [len(next(iter(part.values()))) for part in parts]
    return {
        column: torch.cat([part.get(column, torch.full((n,), torch.nan)) for part, n in zip(parts, lengths, strict=True)])
        for column in dict.fromkeys(column for part in parts for column in part)
    }


def judge(
    rewards: Mapping[str, Reward], images: Tensor, prompts: Sequence[Prompt], device: torch.device | str
) -> tuple[dict[str, Tensor], list[str]]:
    """`score` of images [N, 3, H, W] that may lie elsewhere; one reward after the other, so that one model's memory is enough.

    Raises:
        UserError: as `score`.
    """
    if not prompts:
        return score(rewards, images, prompts)
    device = torch.device(device)
    found: dict[str, Tensor] = {}
    notes = [""] * len(prompts)
    for name, reward in rewards.items():
        with TURNS, on_device(modules_of(reward), device):
            parts = [
                score({name: reward}, images[start : start + PART].to(device), prompts[start : start + PART])
                for start in range(0, len(prompts), PART)
            ]
        found |= joined([scores for scores, _ in parts])
        said = [note for _, part in parts for note in part]
        notes = [note or new for note, new in zip(notes, said, strict=True)]
    return found, notes
