"""What an objective trains on: noised clean samples, or kept steps of a rollout."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from flowtilt.device.micro_batch import parts
from flowtilt.methods.forward import LEAST_TO_MOST
from flowtilt.models.base import RoleModel
from flowtilt.models.conditioning import Conditioning
from flowtilt.models.guidance import guided
from flowtilt.sampling.trajectory import Trajectory


@dataclass(frozen=True)
class Guide:
    """Which rows carry the pull to the guided velocity, and how strong it is.

    Args:
        rows: [M] bool on the CPU.
        weight: of the pull in this rollout, over the share of the rows.
        least: noise level below which a row carries none.
    """

    rows: Tensor
    weight: float
    least: float

    def part(self, rows: slice | Tensor) -> "Guide":
        """Of some of the rows."""
        return Guide(self.rows[rows], self.weight, self.least)

    def at(self, t: Tensor) -> Tensor:
        """Numbers of the rows at t [n] that carry it, on the device of t."""
        return (self.rows.to(t.device) & (t >= self.least)).nonzero()[:, 0]


@dataclass(frozen=True)
class TrainingBatch:
    """Noised samples for a forward-process objective; first axis n, one row a pair of image and time.

    Args:
        weight: [n], of each row's loss in the mean; none is 1.
        referenced: [n] bool, the rows on which the reference is evaluated; none is all.
        guide: none for a rollout without.
        empty: the caption without words, of one row; there where a guide or a guided reference needs it.
        given: constants [n] by name, which `complete` of a method on whole groups has found.
    """

    x0: Tensor
    eps: Tensor
    t: Tensor
    advantages: Tensor
    conditioning: Conditioning
    weight: Tensor | None = None
    guide: Guide | None = None
    empty: Conditioning | None = None
    given: Mapping[str, Tensor] = field(default_factory=dict)
    referenced: Tensor | None = None

    def __len__(self) -> int:
        return len(self.x0)


@dataclass(frozen=True)
class Pairs:
    """Pairs of an image and a time, M rows that become a `TrainingBatch` part by part.

    Args:
        x0, advantages, conditioning: of the images, whose first axis is n.
        image: which of the n each row is, [M] on the CPU.
        t: [M] on the CPU.
        eps: [M, ...] on the CPU, where a whole rollout's noise has room.
        weight, given, referenced: [M] on the CPU, see `TrainingBatch`; so for `guide` and `empty`.
    """

    x0: Tensor
    advantages: Tensor
    conditioning: Conditioning
    image: Tensor
    t: Tensor
    eps: Tensor
    weight: Tensor | None = None
    guide: Guide | None = None
    empty: Conditioning | None = None
    given: Mapping[str, Tensor] = field(default_factory=dict)
    referenced: Tensor | None = None

    def __len__(self) -> int:
        return len(self.image)

    @property
    def device(self) -> torch.device:
        """Where they are trained."""
        return self.x0.device

    def micro_batches(self, size: int) -> Iterator[TrainingBatch]:
        """Consecutive parts of at most `size` rows."""
        for rows in parts(len(self), size):
            image, device = self.image[rows], self.device
            yield TrainingBatch(
                self.x0[image.to(device)],
                self.eps[rows].to(device),
                self.t[rows].to(device),
                self.advantages[image.to(device)],
                self.conditioning.select(image),
                None if self.weight is None else self.weight[rows].to(device),
                self.guide and self.guide.part(rows),
                self.empty,
                {name: value[rows].to(device) for name, value in self.given.items()},
                None if self.referenced is None else self.referenced[rows].to(device),
            )


def draw_times(
    kind: str,
    number: int,
    sigmas: Tensor,
    between: Callable[[Tensor], Tensor],
    rng: torch.Generator,
    within: tuple[float, float] = LEAST_TO_MOST,
) -> Tensor:
    """The training times of one image, [number] fp32 in (0, 1].

    "rollout": `number` of the rollout's own levels `sigmas` [S + 1] without the final 0, in random order,
    without replacement. "stratified": u uniform in `within`, one in each of `number` equal strata, then
    `between` maps it as it maps the levels, see `models.levels`: t = k u / (1 + (k - 1) u) for a shift k. "logit_normal": u the sigmoid
    of a standard normal number instead, each by itself.

    Raises:
        ValueError: an unknown kind, or more times than levels.
    """
    if kind == "rollout":
        levels = len(sigmas) - 1
        if number > levels:
            raise ValueError(f"a rollout of {levels} steps has no {number} noise levels")
        return sigmas[torch.randperm(levels, generator=rng)[:number]]
    if kind == "stratified":
        low, high = within
        u = low + (high - low) * (torch.arange(number) + torch.rand(number, generator=rng)) / number
        return between(u)
    if kind == "logit_normal":
        return between(torch.randn(number, generator=rng).sigmoid())
    raise ValueError(f"times {kind!r} is not 'rollout', 'stratified' or 'logit_normal'")


@dataclass(frozen=True)
class TransitionBatch:
    """Steps from x at sigma to x_next at sigma_next, first axis n; `mean` and `log_prob` are of the policy that took them.

    Args:
        sigma_max: what `solvers.sde_step` has for sigma = 1.
        empty, guidance: as the steps were drawn; `empty` is there for a guide, too.
        guide: none for a rollout without.
    """

    x: Tensor
    x_next: Tensor
    mean: Tensor
    log_prob: Tensor
    sigma: Tensor
    sigma_next: Tensor
    sigma_max: float
    advantages: Tensor
    conditioning: Conditioning
    empty: Conditioning | None
    guidance: float
    guide: Guide | None = None

    def __len__(self) -> int:
        return len(self.x)

    def velocity(self, drawing: RoleModel, role: str, guidance: float | None = None) -> Tensor:
        """v [n, ...] of a role at x, guided as the rollout was, or by a scale of its own."""
        guidance = self.guidance if guidance is None else guidance
        return guided(drawing, role, self.conditioning, self.empty if guidance != 1 else None, guidance)(self.x, self.sigma)


@dataclass(frozen=True)
class Transitions:
    """Steps of a rollout's images, M rows that become a `TransitionBatch` part by part.

    Args:
        path, advantages, conditioning: of the images, whose first axis is n.
        image, step: which of the n and which of its W steps each row is, [M] on the CPU.
        sigmas: the levels of the W steps and the one after, [W + 1].
    """

    path: Trajectory
    advantages: Tensor
    conditioning: Conditioning
    image: Tensor
    step: Tensor
    sigmas: Tensor
    sigma_max: float
    empty: Conditioning | None
    guidance: float
    guide: Guide | None = None

    def __len__(self) -> int:
        return len(self.image)

    @property
    def device(self) -> torch.device:
        """Where the steps are trained."""
        return self.advantages.device

    def micro_batches(self, size: int) -> Iterator[TransitionBatch]:
        """Consecutive parts of at most `size` rows."""
        for rows in parts(len(self), size):
            image, j, device = self.image[rows], self.step[rows], self.device
            yield TransitionBatch(
                self.path.states[image, j].to(device),
                self.path.states[image, j + 1].to(device),
                self.path.means[image, j].to(device),
                self.path.log_probs[image, j].to(device),
                self.sigmas[j].to(device),
                self.sigmas[j + 1].to(device),
                self.sigma_max,
                self.advantages[image.to(device)],
                self.conditioning.select(image),
                self.empty,
                self.guidance,
                self.guide and self.guide.part(rows),
            )
