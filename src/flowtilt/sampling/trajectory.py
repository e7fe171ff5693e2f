"""The way of an image from noise, where a method trains its steps: drawn with noise in some of them, kept, taken apart."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from flowtilt.config import Recipe
from flowtilt.config.objectives import GRPOSettings, RTDMDSettings
from flowtilt.device.micro_batch import parts
from flowtilt.flow import sigma_schedule
from flowtilt.models.base import Drawing
from flowtilt.models.conditioning import Conditioning
from flowtilt.objectives import Collecting
from flowtilt.objectives.rtdmd import subgrpo_steps
from flowtilt.sampling.sampler import Fresh, Sampler, guided, sampler_of
from flowtilt.seeding import step_noise
from flowtilt.solvers import log_prob, sde_step, solve


@dataclass(frozen=True)
class Trajectory:
    """The W stochastic steps of n images, on the CPU.

    Args:
        states: before each of them and after the last, [n, W + 1, ...].
        means: what each step's noise was added to, [n, W, ...].
        log_probs: of each step, [n, W].
    """

    states: Tensor
    means: Tensor
    log_probs: Tensor

    @staticmethod
    def join(parts: Sequence["Trajectory"]) -> "Trajectory":
        """The images of all parts."""
        return Trajectory(*(torch.cat([getattr(part, field.name) for part in parts]) for field in fields(Trajectory)))


@dataclass(frozen=True)
class PathSampler:
    """A sampler that takes a random step where `stochastic` says, and follows the ODE before and after.

    Args:
        sde, eta: see `solvers.sde_step`.
    """

    sampler: Sampler
    sde: str
    eta: float
    stochastic: range

    @torch.no_grad()
    def __call__(
        self,
        drawing: Drawing,
        role: str,
        start: Tensor,
        conditioning: Conditioning,
        fresh: Fresh,
        micro_batch: int,
    ) -> tuple[Tensor, Trajectory]:
        """Latents [N, ...] and their way."""
        sigmas = sigma_schedule(self.sampler.steps, drawing.model.shift)
        empty = self.sampler.empty(drawing)
        first, end = self.stochastic.start, self.stochastic.stop
        latents, paths = [], []
        for rows in torch.arange(len(start)).split(micro_batch):
            velocity = guided(drawing, role, conditioning.select(rows), empty, self.sampler.guidance)
            x = start[rows.to(start.device)]
            x = solve(velocity, x, sigmas[: first + 1], self.sampler.solver) if first else x
            states, means, log_probs = [x.cpu()], [], []
            for j in self.stochastic:
                s = sigmas[j].to(x.device)
                z = fresh(rows, j).to(x.device)
                x, mean, std = sde_step(x, velocity(x, s), s, sigmas[j + 1].to(x.device), z, self.sde, self.eta, float(sigmas[1]))
                states.append(x.cpu())
                means.append(mean.cpu())
                log_probs.append(log_prob(x, mean, std).cpu())
            latents.append(solve(velocity, x, sigmas[end:], self.sampler.solver) if end < self.sampler.steps else x)
            paths.append(Trajectory(torch.stack(states, 1), torch.stack(means, 1), torch.stack(log_probs, 1)))
        return torch.cat(latents), Trajectory.join(paths)


Collect = Callable[[Drawing, Tensor, Conditioning, Sequence[tuple[int, int, int]], int], tuple[Tensor, Trajectory | None]]
"""Latents [N, ...], and their ways, of noise [N, ...], N captions, the images' (rollout, prompt, copy), and a micro-batch."""


def collector(recipe: Recipe, objective: Collecting, rollout: int) -> Collect:
    """How rollout number `rollout`, from 1, draws its images with the collecting policy."""
    r, o = recipe.rollout, recipe.objective
    sampler, paths = sampler_of(r), None
    shared: set[int] = set()
    if isinstance(o, RTDMDSettings):
        every = objective.stochastic(rollout - 1, r.steps, recipe.seed)
        shared = set(every) - set(subgrpo_steps(rollout - 1, r.steps, o.trained_steps, recipe.seed))
        last = Sampler("euler", r.steps)  # of its single step to 0, which is x0_hat for every solver
        paths = PathSampler(last, "cps", r.cps_eta(), every)
    elif isinstance(o, GRPOSettings):
        paths = PathSampler(sampler, o.sde, o.eta, objective.stochastic(rollout - 1, r.steps, recipe.seed))

    def collect(
        drawing: Drawing, start: Tensor, given: Conditioning, where: Sequence[tuple[int, int, int]], size: int
    ) -> tuple[Tensor, Trajectory | None]:
        own = step_noise(recipe.seed, "sde", where, drawing.model.latent_shape)
        of_prompt = step_noise(recipe.seed, "shared", [place[:2] for place in where], drawing.model.latent_shape)

        def fresh(rows: Tensor, j: int) -> Tensor:
            # in a step that is not trained a prompt's images part by nothing, so that rewards tell of those that are
            return of_prompt(rows, j) if j in shared else own(rows, j)

        if paths:
            return paths(drawing, "old", start, given, fresh, size)
        return sampler(drawing, "old", start, given, size, fresh), None

    return collect


@dataclass(frozen=True)
class TransitionBatch:
    """Steps from x at sigma to x_next at sigma_next, first axis n; `mean` and `log_prob` are of the policy that took them.

    Args:
        sigma_max: what `solvers.sde_step` has for sigma = 1.
        empty, guidance: as the steps were drawn.
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

    def __len__(self) -> int:
        return len(self.x)

    def velocity(self, drawing: Drawing, role: str) -> Tensor:
        """v [n, ...] of a role at x, guided as the rollout was."""
        return guided(drawing, role, self.conditioning, self.empty, self.guidance)(self.x, self.sigma)


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
            )
