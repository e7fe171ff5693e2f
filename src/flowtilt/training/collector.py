"""How a rollout samples its images."""

from collections.abc import Callable, Sequence

from torch import Tensor

from flowtilt.build import sampler_of
from flowtilt.config import Recipe
from flowtilt.config.objectives import GRPOSettings, RTDMDSettings
from flowtilt.models.base import Drawing
from flowtilt.models.conditioning import Conditioning
from flowtilt.objectives import Collecting
from flowtilt.objectives.rtdmd import subgrpo_steps
from flowtilt.sampling.sampler import Sampler
from flowtilt.sampling.trajectory import PathSampler, Trajectory
from flowtilt.seeding import step_noise

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
