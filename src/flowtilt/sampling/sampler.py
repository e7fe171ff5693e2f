"""Images from a policy, and what of them training keeps."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from flowtilt.models.base import RoleModel
from flowtilt.models.conditioning import Conditioning
from flowtilt.models.guidance import guided
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
        self, drawing: RoleModel, role: str, noise: Tensor, conditioning: Conditioning, micro_batch: int, fresh: Fresh | None = None
    ) -> Tensor:
        """Latents [N, ...] fp32 from noise [N, ...] and the conditioning of N captions, `micro_batch` images at a time.

        Args:
            fresh: the noise of the steps of cps; an ODE solver asks for none.

        Raises:
            ValueError: cps without `fresh`.
        """
        sigmas = drawing.model.levels(self.steps)
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

    def empty(self, drawing: RoleModel) -> Conditioning | None:
        """The negative caption, which guidance leads away from; none without guidance."""
        return drawing.model.encode_negative() if self.guidance != 1 else None


@torch.no_grad()
def decode(drawing: RoleModel, latents: Tensor, micro_batch: int) -> Tensor:
    """Images [N, 3, H, W] in [0, 1], on the CPU, of latents [N, ...]."""
    return torch.cat([drawing.model.decode(part).cpu() for part in latents.split(micro_batch)])
