"""The way of an image from noise, where a method trains its steps: drawn with noise in some of them, kept, taken apart."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from flowtilt.models.base import RoleModel
from flowtilt.models.conditioning import Conditioning
from flowtilt.models.guidance import guided
from flowtilt.sampling.sampler import Fresh, Sampler
from flowtilt.solvers import log_prob, sde_step, solve


@dataclass(frozen=True)
class KeptSteps:
    """Which steps of a rollout are stochastic and kept for training.

    Args:
        steps: those, in a row.
        sde, eta: see `solvers.sde_step`; "cps" at 0 is Euler's step, which has no density.
        shared: steps in which all images of a prompt have the same noise, so that rewards tell of the others.
    """

    steps: range
    sde: str
    eta: float
    shared: frozenset[int] = frozenset()


@dataclass(frozen=True)
class Trajectory:
    """The W stochastic steps of n images, on the CPU.

    Args:
        states: before each of them and after the last, [n, W + 1, ...].
        means: what each step's noise was added to, [n, W, ...].
        log_probs: of each step, [n, W]; NaN where it has no density.
        steps: which of the rollout's steps they are.
    """

    states: Tensor
    means: Tensor
    log_probs: Tensor
    steps: range

    @staticmethod
    def join(parts: Sequence["Trajectory"]) -> "Trajectory":
        """The images of all parts."""
        states, means, log_probs = (torch.cat([getattr(part, name) for part in parts]) for name in ("states", "means", "log_probs"))
        return Trajectory(states, means, log_probs, parts[0].steps)


@dataclass(frozen=True)
class PathSampler:
    """A sampler that takes a random step where `kept` says, and follows the ODE before and after."""

    sampler: Sampler
    kept: KeptSteps

    @torch.no_grad()
    def __call__(
        self,
        drawing: RoleModel,
        role: str,
        start: Tensor,
        conditioning: Conditioning,
        fresh: Fresh,
        micro_batch: int,
    ) -> tuple[Tensor, Trajectory]:
        """Latents [N, ...] and their way."""
        sigmas = drawing.model.levels(self.sampler.steps)
        empty = self.sampler.empty(drawing)
        steps = self.kept.steps
        first, end = steps.start, steps.stop
        latents, paths = [], []
        for rows in torch.arange(len(start)).split(micro_batch):
            velocity = guided(drawing, role, conditioning.select(rows), empty, self.sampler.guidance)
            x = start[rows.to(start.device)]
            x = solve(velocity, x, sigmas[: first + 1], self.sampler.solver) if first else x
            states, means, log_probs = [x.cpu()], [], []
            for j in steps:
                s = sigmas[j].to(x.device)
                z = fresh(rows, j).to(x.device)
                x, mean, std = sde_step(x, velocity(x, s), s, sigmas[j + 1].to(x.device), z, self.kept.sde, self.kept.eta, float(sigmas[1]))
                states.append(x.cpu())
                means.append(mean.cpu())
                log_probs.append((log_prob(x, mean, std) if self.kept.eta else x.new_full((len(x),), torch.nan)).cpu())
            latents.append(solve(velocity, x, sigmas[end:], self.sampler.solver) if end < self.sampler.steps else x)
            paths.append(Trajectory(torch.stack(states, 1), torch.stack(means, 1), torch.stack(log_probs, 1), steps))
        return torch.cat(latents), Trajectory.join(paths)
