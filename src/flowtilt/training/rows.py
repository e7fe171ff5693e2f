"""What a rollout's images become in training: pairs of an image and a noise level, or steps of their paths.

Times, noise and everything else that is drawn come from a generator of the image or of its prompt, so that no rank and no
micro-batch changes them.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from flowtilt.build import sampler_of
from flowtilt.config import RolloutSettings
from flowtilt.models.conditioning import Conditioning
from flowtilt.objectives.batches import Guide, Pairs, Transitions, draw_times
from flowtilt.policy.roles import Policy
from flowtilt.seeding import generator
from flowtilt.training.scored import ScoredRollout


def row_counts(advantages: Tensor, number: int, share: float, rng: torch.Generator) -> tuple[Tensor, Tensor]:
    """How many of about `share * number * N` rows each of N images has, and the weight of each of its rows; [N] each.

    The expected count of an image is in proportion to |A| + 0.3 rms(A), and the weight is `number` over it: the weighted sum of an
    unbiased estimate per row stands for the sum over `number` rows per image. The counts are those of one systematic sample, each
    within 1 of its expectation.

    Args:
        advantages: [N]; NaN has no rows.
    """
    known = ~advantages.isnan()
    size = advantages.nan_to_num(0.0).double().abs()
    expected = torch.where(known, size + 0.3 * size[known].square().mean().sqrt(), 0.0)
    expected = torch.where(known, torch.ones_like(size), 0.0) if expected.sum() == 0 else expected
    expected *= share * number * known.sum() / expected.sum()
    edges = torch.cat([torch.zeros(1, dtype=torch.float64), expected.cumsum(0)]) + torch.rand((), generator=rng, dtype=torch.float64)
    return edges.floor().diff().long(), (number / expected.clamp_min(1e-12)).float()


class RowMaker:
    """Makes the rows of a rollout's images.

    Args:
        objective: whose training times, or steps, they are.
        seed: of times and noise.
    """

    def __init__(self, policy: Policy, objective: Any, rollout: RolloutSettings, seed: int):
        self._policy, self._objective, self._rollout, self._seed = policy, objective, rollout, seed
        self.per_image = objective.rows_per_image(rollout.steps)
        """Rows of an image in the mean of the loss."""

    def rows(self, step: int, rollout: ScoredRollout, own: list[int]) -> Pairs | Transitions:
        """What is trained of this rank's images `own` in rollout number `step`, from 1."""
        if rollout.path is not None:
            return self._transitions(step, rollout, own)
        counts, weights = self._counts(step, rollout)
        image = torch.tensor(own, dtype=torch.long).repeat_interleave(counts[own])
        guide = self._guide(step, rollout, own, counts)
        return Pairs(
            rollout.x0,
            rollout.advantages,
            rollout.conditioning,
            image,
            *self._times_and_noise(step, rollout, own, counts),
            None if weights is None else weights[image],
            guide,
            self._empty(guide is not None),
            referenced=self._referenced(step, rollout, own, counts),
        )

    def _counts(self, step: int, rollout: ScoredRollout) -> tuple[Tensor, Tensor | None]:
        """Of this rank's images: rows, and their weight where not all rows are trained; [n] each."""
        share, here = getattr(self._objective, "row_share", 1.0), slice(rollout.indices.start, rollout.indices.stop)
        if share == 1:
            return torch.full((len(rollout.x0),), self.per_image), None
        counts, weights = row_counts(rollout.all_advantages, self.per_image, share, generator(self._seed, "rows", step))
        return counts[here], weights[here]

    def _times_and_noise(self, step: int, rollout: ScoredRollout, own: list[int], counts: Tensor) -> tuple[Tensor, Tensor]:
        """t [M] and eps [M, ...]; an image's come from its own generator, or from its prompt's where they are shared."""
        o, model = self._objective, self._policy.model
        sigmas, between = model.levels(self._rollout.steps), partial(model.levels.at, steps=self._rollout.steps)
        total = int(counts[own].sum())
        times, eps = torch.empty(total), torch.empty(total, *model.latent_shape)
        at = 0
        for i in own:
            number, index = int(counts[i]), rollout.indices.start + i
            mine = generator(self._seed, "train", step, index)
            group = int(rollout.groups[index])
            for_time = generator(self._seed, "shared times", step, group) if o.shared in ("time", "both") else mine
            for_noise = generator(self._seed, "shared noise", step, group) if o.shared in ("noise", "both") else mine
            times[at : at + number] = draw_times(o.times, number, sigmas, between, for_time, o.times_range)
            # in place: a rollout's noise may be gigabytes
            torch.randn((number, *model.latent_shape), generator=for_noise, out=eps[at : at + number])
            at += number
        return times, eps

    def _guide(self, step: int, rollout: ScoredRollout, own: Sequence[int], counts: Tensor) -> Guide | None:
        """Which rows carry the guide, from a generator of their image; none in a rollout without."""
        o = self._objective
        weight = o.guide_weight(step - 1) if hasattr(o, "guide_weight") else 0.0
        if not weight:
            return None
        return Guide(self._drawn("guide", step, rollout, own, counts) < o.guide_share, weight / o.guide_share, o.guide_from)

    def _referenced(self, step: int, rollout: ScoredRollout, own: Sequence[int], counts: Tensor) -> Tensor | None:
        """Which rows ask the reference, [M] bool; none where all do."""
        share = getattr(self._objective, "reference_share", 1.0)
        return None if share == 1 else self._drawn("reference", step, rollout, own, counts) < share

    def _drawn(self, purpose: str, step: int, rollout: ScoredRollout, own: Sequence[int], counts: Tensor) -> Tensor:
        """A number in [0, 1) for each row, [M], from a generator of its image."""
        of = [torch.rand(int(counts[i]), generator=generator(self._seed, purpose, step, rollout.indices.start + i)) for i in own]
        return torch.cat([*of, torch.empty(0)])

    def _empty(self, guide: bool) -> Conditioning | None:
        guided = guide or getattr(self._objective, "reference_guidance", 1.0) != 1
        return self._policy.model.encode_negative() if guided else None

    def _transitions(self, step: int, rollout: ScoredRollout, own: list[int]) -> Transitions:
        assert rollout.path is not None
        r, model = self._rollout, self._policy.model
        levels = model.levels(r.steps)
        steps = rollout.path.steps
        guide = self._guide(step, rollout, own, torch.full((len(rollout.x0),), len(steps)))
        return Transitions(
            rollout.path,
            rollout.advantages,
            rollout.conditioning,
            torch.tensor(own, dtype=torch.long).repeat_interleave(self.per_image),
            torch.arange(len(steps)).repeat(len(own)),
            levels[steps.start : steps.stop + 1],
            float(levels[1]),
            sampler_of(r).empty(self._policy) or self._empty(guide is not None),
            r.guidance,
            guide,
        )
