"""Prompts that teach: those whose images are rewarded unlike, and tags of low reward, come more often. CGPO, arXiv 2605.17807.

The public code fills a batch from prompts at random, each kept with probability P, and gives a prompt type the factor
1 + lambda v, v the normalised inverse of its mean reward. Here the types are the tags. Variances are compared within a tag, or
the reward with the largest scale would decide alone.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from flowtilt.prompts.prompt import Prompt
from flowtilt.seeding import generator

LEAST = 0.1
"""A prompt's probability is never lower."""
REMEMBERED = 3
"""Variances of a prompt that its probability is the mean of."""
STRENGTH = 10.0
"""lambda: how much a tag of low reward is preferred."""
GREATEST = 0.6
"""Variances count up to this."""


def tag_shares(rewards: Mapping[str, float], tags: Sequence[str], strength: float = STRENGTH) -> list[float]:
    """Share of each tag in a rollout: (1 + strength v) / (tags + strength), v = (1 / r) / sum(1 / r); sums to 1.

    It maximises sum log q + strength sum v log q over the shares q. A tag whose reward r is not known yet has the mean of the others'.

    Args:
        rewards: running mean reward by tag; what is not positive counts as .01.
    """
    inverse = {tag: 1 / max(rewards[tag], 0.01) for tag in tags if tag in rewards}
    unknown = sum(inverse.values()) / len(inverse) if inverse else 1.0
    total = sum(inverse.get(tag, unknown) for tag in tags)
    return [(1 + strength * inverse.get(tag, unknown) / total) / (len(tags) + strength) for tag in tags]


class TeachingPrompts:
    """Chooses the prompts of each rollout from what the rollouts before have taught.

    Args:
        prompts: all of them.
        seed: of every choice.
        turns: of each tag, as in `PromptWalk`; none chooses tags by their reward.
        by_variance: prefer prompts whose images are rewarded unlike; otherwise a tag's prompts come in turn.
    """

    def __init__(self, prompts: Sequence[Prompt], seed: int, turns: Mapping[str, int] | None, by_variance: bool):
        self._seed, self._turns, self._by_variance = seed, turns, by_variance
        self._tags = [tag for tag in dict.fromkeys(p.tag for p in prompts) if turns is None or turns.get(tag, 1)]
        self._prompts = list(prompts)
        self._by_tag = {tag: [k for k, p in enumerate(prompts) if p.tag == tag] for tag in self._tags}
        self._reward: dict[str, float] = {}
        self._met = dict.fromkeys(self._tags, 0)
        self._recent: list[list[float]] = [[0.5] for _ in prompts]
        self._drawn: dict[int, list[int]] = {}

    def take(self, step: int, count: int) -> list[Prompt]:
        """The prompts of rollout number `step`, from 1, chosen when it is first asked for; distinct as far as a tag has as many."""
        if step not in self._drawn:
            found: list[int] = []
            for number, (tag, wanted) in enumerate(zip(self._tags, self._counts(step, count), strict=True)):
                choose = self._varied if self._by_variance else self._next
                found += choose(step, number, tag, wanted)
            self._drawn[step] = found
        return [self._prompts[k] for k in self._drawn[step]]

    def learn(self, step: int, rewards: Tensor) -> None:
        """Remembers the rewards [N] of the images of rollout `step`, an equal number for each of its prompts; NaN is a missing one."""
        drawn = self._drawn.pop(step)
        groups = rewards.double().view(len(drawn), -1)
        self._remember_tags(drawn, groups)
        if self._by_variance:
            self._remember_variances(drawn, groups)

    def probability(self, prompt: int) -> float:
        """P of a prompt, in [0.1, 1]."""
        recent = self._recent[prompt]
        return min(1.0, max(LEAST, sum(recent) / len(recent)))

    def state(self) -> dict[str, Any]:
        """What a checkpoint needs of it."""
        learnt = {"reward": self._reward, "met": self._met, "recent": self._recent if self._by_variance else []}
        return learnt | ({"drawn": {str(step): drawn for step, drawn in self._drawn.items()}} if self._drawn else {})

    def load(self, state: Mapping[str, Any]) -> None:
        """Goes on from a checkpoint's `state`."""
        self._reward, self._met = dict(state["reward"]), dict(state["met"])
        self._recent = [list(values) for values in state["recent"]] or self._recent
        self._drawn = {int(step): list(drawn) for step, drawn in state.get("drawn", {}).items()}

    def _counts(self, step: int, count: int) -> list[int]:
        """Prompts of each tag, as systematic sampling gives them: each within 1 of its share."""
        if self._turns is None:
            shares = tag_shares(self._reward, self._tags)
        else:
            turns = [self._turns.get(tag, 1) for tag in self._tags]
            shares = [turn / sum(turns) for turn in turns]
        edges = torch.tensor([0.0, *shares], dtype=torch.float64).cumsum(0) * count
        edges[-1] = count
        edges += torch.rand((), generator=generator(self._seed, "tags", step), dtype=torch.float64)
        return edges.floor().diff().long().tolist()

    def _next(self, step: int, number: int, tag: str, wanted: int) -> list[int]:
        """The tag's next prompts, without replacement within a pass."""
        own, found = self._by_tag[tag], []
        for _ in range(wanted):
            cycle, place = divmod(self._met[tag], len(own))
            order = torch.randperm(len(own), generator=generator(self._seed, "prompts", number, cycle))
            found.append(own[int(order[place])])
            self._met[tag] += 1
        return found

    def _varied(self, step: int, number: int, tag: str, wanted: int) -> list[int]:
        """Prompts in random order, each kept with its probability, until there are enough; then those that were passed over."""
        own, rng = self._by_tag[tag], generator(self._seed, "prompts", number, step)
        found: list[int] = []
        while len(found) < wanted:
            kept, passed = [], []
            for k in torch.randperm(len(own), generator=rng).tolist():
                (kept if float(torch.rand((), generator=rng)) < self.probability(own[k]) else passed).append(own[k])
            found += [*kept, *passed][: wanted - len(found)]
        return found

    def _remember_tags(self, drawn: list[int], groups: Tensor) -> None:
        for tag in self._tags:
            rows = [k for k, prompt in enumerate(drawn) if self._prompts[prompt].tag == tag]
            mean = float(groups[rows].nanmean()) if rows else float("nan")
            if mean == mean:
                self._reward[tag] = (self._reward[tag] + mean) / 2 if tag in self._reward else mean

    def _remember_variances(self, chosen: list[int], groups: Tensor) -> None:
        """P' of each prompt: its variance between the tag's least and greatest; those that were not drawn come nearer to 1."""
        for tag in self._tags:
            variances: dict[int, float] = {}
            for k, prompt in enumerate(chosen):
                known = groups[k][~groups[k].isnan()]
                if self._prompts[prompt].tag == tag and len(known) > 1:
                    variances[prompt] = min(float(known.var()), GREATEST)
            low, high = min(variances.values(), default=0.0), max(variances.values(), default=0.0)
            for prompt in self._by_tag[tag]:
                if prompt in variances:
                    now = max(LEAST, (variances[prompt] - low) / (high - low)) if high > low else 0.5
                else:
                    now = min(1.0, self._recent[prompt][-1] + len(variances) / len(self._by_tag[tag]))
                self._recent[prompt] = [*self._recent[prompt], now][-REMEMBERED:]
