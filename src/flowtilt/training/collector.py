"""How a rollout samples its images."""

from collections.abc import Callable, Sequence

from torch import Tensor

from flowtilt.build import sampler_of
from flowtilt.config import RolloutSettings
from flowtilt.models.base import RoleModel
from flowtilt.models.conditioning import Conditioning
from flowtilt.objectives import RolloutSpec
from flowtilt.sampling.sampler import Sampler
from flowtilt.sampling.trajectory import PathSampler, Trajectory
from flowtilt.seeding import step_noise

Collect = Callable[[RoleModel, Tensor, Conditioning, Sequence[tuple[int, int, int]], int], tuple[Tensor, Trajectory | None]]
"""Latents [N, ...], and their ways, of noise [N, ...], N captions, the images' (rollout, prompt, copy), and a micro-batch."""


def collector(settings: RolloutSettings, seed: int, rollout: int, objective: RolloutSpec | None = None, role: str = "old") -> Collect:
    """How rollout number `rollout`, from 1, samples its images with the policy's `role`.

    Args:
        objective: the method that the rollout is for; none keeps no steps.
    """
    r = settings
    kept = objective.keeps(rollout - 1, r, seed) if objective else None
    sampler, paths, shared = sampler_of(r), None, frozenset[int]()
    if kept:
        # of cps only the step to 0 is deterministic, and that one is Euler's for every solver
        between = Sampler("euler" if r.solver == "cps" else r.solver, r.steps, r.guidance)
        paths, shared = PathSampler(between, kept), kept.shared

    def collect(
        drawing: RoleModel, start: Tensor, given: Conditioning, where: Sequence[tuple[int, int, int]], size: int
    ) -> tuple[Tensor, Trajectory | None]:
        own = step_noise(seed, "sde", where, drawing.model.latent_shape)
        of_prompt = step_noise(seed, "shared", [place[:2] for place in where], drawing.model.latent_shape)

        def fresh(rows: Tensor, j: int) -> Tensor:
            # in a step that is not trained a prompt's images part by nothing, so that rewards tell of those that are
            return of_prompt(rows, j) if j in shared else own(rows, j)

        if paths:
            return paths(drawing, role, start, given, fresh, size)
        return sampler(drawing, role, start, given, size, fresh), None

    return collect
