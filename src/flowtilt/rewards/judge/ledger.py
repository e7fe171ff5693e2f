"""The judges of a run: where they keep their answers, and what they have cost it."""

from collections.abc import Iterable, Mapping
from pathlib import Path

import torch

from flowtilt.distributed.world import World
from flowtilt.rewards import Reward
from flowtilt.rewards.judge.asking import Asking
from flowtilt.rewards.judge.budget import Limits, Spent

PREFIX = "spent/"
"""Of the metrics, "spent/judge/calls"."""


def keep_answers(rewards: Iterable[Reward], folder: Path, world: World) -> None:
    """Every judge among the rewards finds its answers in `folder`, and keeps new ones there."""
    if judges := _judges(rewards):
        for judge in judges:
            judge.opened(folder, world.rank, world.size)
        world.barrier()  # nobody writes before everybody has read


def spending(rewards: Iterable[Reward], world: World) -> dict[str, float]:
    """What the judges of a run have cost so far on all ranks, as metrics: calls, tokens, and money where there are prices."""
    found: dict[str, float] = {}
    for judge in _judges(rewards):
        own, before, limits = judge.budget.own, judge.budget.before, judge.budget.limits
        counts = torch.tensor([own.calls, own.read, own.written], dtype=torch.float64, device=world.device)
        world.sum_([counts])
        total = before + Spent(*(int(count) for count in counts))
        found |= {f"{PREFIX}{judge.name}/{key}": value for key, value in _columns(total, limits).items()}
    return found


def _columns(total: Spent, limits: Limits) -> Mapping[str, float]:
    priced = {"cost": limits.cost(total)} if limits.price_in or limits.price_out else {}
    return {"calls": float(total.calls), "tokens": float(total.tokens), **priced}


def _judges(rewards: Iterable[Reward]) -> list[Asking]:
    """Each once, in order."""
    return list({id(reward): reward for reward in rewards if isinstance(reward, Asking)}.values())
