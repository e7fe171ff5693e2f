"""Images from a policy, and what of them training keeps."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from flowtilt.config import CPS_ETA, EvaluateSettings, RolloutSettings
from flowtilt.device.micro_batch import parts
from flowtilt.errors import UserError
from flowtilt.flow import sigma_schedule
from flowtilt.models.base import Drawing
from flowtilt.models.conditioning import Conditioning
from flowtilt.solvers import Velocity, solve, solve_cps

Fresh = Callable[[Tensor, int], Tensor]
"""Standard normal noise [n, ...] of the rows [n] at a step, counted from 0; `seeding.step_noise` makes one."""


@dataclass(frozen=True)
class Sampler:
    """How latents come out of noise: an ODE solver or "cps", its number of steps, and guidance (1 is none).

    Args:
        eta: how much of the noise is new in a step of cps, in (0, 1]; none for an ODE solver.

    Raises:
        ValueError: cps without an eta in (0, 1], or an ODE solver with one.
    """

    solver: str
    steps: int
    guidance: float = 1.0
    eta: float | None = None

    def __post_init__(self) -> None:
        if self.solver != "cps" and self.eta is not None:
            raise ValueError(f"eta: belongs to solver cps, not {self.solver}")
        if self.solver == "cps" and (self.eta is None or not 0 < self.eta <= 1):
            raise ValueError(f"eta: must be above 0 and at most 1, not {self.eta}")

    @torch.no_grad()
    def __call__(
        self, drawing: Drawing, role: str, noise: Tensor, conditioning: Conditioning, micro_batch: int, fresh: Fresh | None = None
    ) -> Tensor:
        """Latents [N, ...] fp32 from noise [N, ...] and the conditioning of N captions, `micro_batch` images at a time.

        Args:
            fresh: the noise of the steps of cps; an ODE solver asks for none.

        Raises:
            ValueError: cps without `fresh`.
        """
        sigmas = sigma_schedule(self.steps, drawing.model.shift)
        empty = self.empty(drawing)
        parts = []
        for rows in torch.arange(len(noise)).split(micro_batch):
            velocity = guided(drawing, role, conditioning.select(rows), empty, self.guidance)
            parts.append(self._carry(velocity, noise[rows.to(noise.device)], sigmas, rows, fresh))
        return torch.cat(parts)

    def _carry(self, velocity: Velocity, x: Tensor, sigmas: Tensor, rows: Tensor, fresh: Fresh | None) -> Tensor:
        """x [n, ...], the noise of `rows` [n], carried to the last level."""
        if self.eta is None:
            return solve(velocity, x, sigmas, self.solver)
        if fresh is None:
            raise ValueError("fresh: cps draws new noise in its steps; give a function of rows and step, as seeding.step_noise makes")
        return solve_cps(velocity, x, sigmas, lambda j: fresh(rows, j).to(x.device), self.eta)

    def empty(self, drawing: Drawing) -> Conditioning | None:
        """The caption without words that guidance leads away from; none without guidance."""
        return drawing.model.encode([""]) if self.guidance != 1 else None


def sampler_of(
    settings: RolloutSettings | EvaluateSettings,
    *,
    solver: str | None = None,
    steps: int | None = None,
    guidance: float | None = None,
    eta: float | None = None,
) -> Sampler:
    """The sampler of a recipe's rollout or evaluation; what is said besides takes the place of its settings.

    Raises:
        UserError: an eta that the solver does not have, or outside (0, 1].
    """
    solver = solver or settings.solver
    if eta is None and solver == "cps":
        eta = CPS_ETA if settings.eta is None else settings.eta
    try:
        return Sampler(solver, steps or settings.steps, settings.guidance if guidance is None else guidance, eta)
    except ValueError as error:
        raise UserError(str(error)) from None


def guided(drawing: Drawing, role: str, given: Conditioning, empty: Conditioning | None, guidance: float) -> Velocity:
    """v_empty + guidance (v - v_empty) as a function of x [N, ...] and sigma [] or [N]; v where `empty` is none."""
    if empty is None:
        return lambda x, sigma: drawing.velocity(role, x, sigma, given)
    both = given.join(empty.select(torch.zeros(len(given), dtype=torch.long)))

    def velocity(x: Tensor, sigma: Tensor) -> Tensor:
        v, free = drawing.velocity(role, torch.cat([x, x]), sigma.expand(len(x)).repeat(2), both).chunk(2)
        return free + guidance * (v - free)

    return velocity


@torch.no_grad()
def decode(drawing: Drawing, latents: Tensor, micro_batch: int) -> Tensor:
    """Images [N, 3, H, W] in [0, 1], on the CPU, of latents [N, ...]."""
    return torch.cat([drawing.model.decode(part).cpu() for part in latents.split(micro_batch)])


@dataclass(frozen=True)
class TrainingBatch:
    """Noised samples for a forward-process objective; first axis n, one row a pair of image and time."""

    x0: Tensor
    eps: Tensor
    t: Tensor
    advantages: Tensor
    conditioning: Conditioning

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
    """

    x0: Tensor
    advantages: Tensor
    conditioning: Conditioning
    image: Tensor
    t: Tensor
    eps: Tensor

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
            )


def draw_times(kind: str, number: int, sigmas: Tensor, shift: float, rng: torch.Generator) -> Tensor:
    """The training times of one image, [number] fp32 in (0, 1].

    "rollout": `number` of the rollout's own levels `sigmas` [S + 1] without the final 0, in random order,
    without replacement. "stratified": u uniform in (.02, 1), one in each of `number` equal strata, then
    shifted as the levels are: t = k u / (1 + (k - 1) u).

    Raises:
        ValueError: an unknown kind, or more times than levels.
    """
    if kind == "rollout":
        levels = len(sigmas) - 1
        if number > levels:
            raise ValueError(f"a rollout of {levels} steps has no {number} noise levels")
        return sigmas[torch.randperm(levels, generator=rng)[:number]]
    if kind == "stratified":
        u = 0.02 + 0.98 * (torch.arange(number) + torch.rand(number, generator=rng)) / number
        return shift * u / (1 + (shift - 1) * u)
    raise ValueError(f"times {kind!r} is not 'rollout' or 'stratified'")
