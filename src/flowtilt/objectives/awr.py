"""FlowAWR, arXiv 2606.30376, read off its public code: regress v on a target that lies beyond, or behind, the old policy's.

Shapes   N samples; velocities [N, ...]; A, E and t [N]. Everything fp32, t in (0, 1].
    code                                             here
    energy E of an image within its group            energies(A, groups)
    v_old + E (v_target - v_old)                     awr_target
    mean (t (v - awr_target))^2 / w, w of v's x0     awr_loss

With w = 1 and E without its clip the optimum at fixed x_t is v_old + E_old[E (v_target - v_old) | x_t]: in the direction of the
optimum tilted by exp(A / temperature), shorter or longer by E_old[W | x_t] / W [derived]. With the published w, which depends on
x0, the direction is that of the tilted optimum only at high noise levels.

NFT without its adaptive weight is this loss with E = clip(A) / (c beta), times c beta: at beta = 1 / c the two are equal [derived].
"""

from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

from flowtilt.flow import per_sample
from flowtilt.methods.awr import AWRSettings
from flowtilt.objectives.forward import LEAST_ERROR, ForwardProcess, Velocities, velocity_kl

if TYPE_CHECKING:
    from flowtilt.objectives.batches import TrainingBatch

LEAST_SPREAD = 1e-2
"""The gate divides by no less."""


def energies(
    advantages: Tensor, groups: Tensor, kind: str = "exponential", *, temperature: float = 1.0, clip: float = 3.0, gate: bool = False
) -> Tensor:
    """E [N] fp32 of the advantages [N] of images in groups [N]: how far the target moves from v_old toward (or from) the image.

    1 is plain flow matching on the image, 0 stays at v_old, -1 is the mirror image. Unclipped energies sum to 0 within a group; a
    flat group, and a group of one image, has 0.

    Args:
        advantages: NaN is a missing value: absent from its group, and NaN here.
        kind: "exponential", "linear" or "sparsemax".
        gate: divide E / k by max(its standard deviation in the group + 1e-4, 0.01).

    Raises:
        ValueError: an unknown kind.
    """
    if kind not in ("exponential", "linear", "sparsemax"):
        raise ValueError(f"energy {kind!r} is not 'exponential', 'linear' or 'sparsemax'")
    found = torch.full_like(advantages, torch.nan, dtype=torch.float64)
    for group in groups.unique():
        rows = (groups == group) & ~advantages.isnan()
        number = int(rows.sum())
        if not number:
            continue
        scaled = advantages[rows].double() / temperature
        match kind:
            case "exponential":
                energy = number * scaled.softmax(0) - 1
            case "linear":
                energy = scaled
            case _:
                energy = number * sparsemax(scaled) - 1
        if gate:
            share = energy / number
            energy = share / (share.std(correction=0) + 1e-4).clamp_min(LEAST_SPREAD)
        found[rows] = energy.clamp(-clip, clip)
    return found.float()


def sparsemax(values: Tensor) -> Tensor:
    """The point of the probability simplex nearest to `values` [k]; Martins and Astudillo, arXiv 1602.02068."""
    ordered = values.sort(descending=True).values
    count = torch.arange(1, len(values) + 1, dtype=values.dtype, device=values.device)
    above = ordered.cumsum(0) - 1
    support = int((ordered * count > above).sum())
    return (values - above[support - 1] / support).clamp_min(0)


def awr_target(v_old: Tensor, v_target: Tensor, energy: Tensor) -> Tensor:
    """v_old + E (v_target - v_old), [N, ...]."""
    return v_old + per_sample(energy, v_old) * (v_target - v_old)


def awr_loss(v: Tensor, v_old: Tensor, v_target: Tensor, t: Tensor | float, energy: Tensor, *, adaptive: bool = True) -> Tensor:
    """mean (t (v - awr_target))^2 / w for each sample, [N].

    Args:
        v: the trained policy's velocity [N, ...]; the only one that carries a gradient.
        adaptive: w = max(mean |t (v - v_target)|, 1e-5), the error of x0 itself, without gradient; false has w = 1.
    """
    off = per_sample(t, v) * (v - awr_target(v_old, v_target, energy).detach())
    error = off.square().flatten(1).mean(1)
    if not adaptive:
        return error
    weight = (per_sample(t, v) * (v.detach() - v_target)).abs().flatten(1).mean(1, dtype=torch.float64)
    return error / weight.clamp_min(LEAST_ERROR).to(error.dtype)


class AWR(AWRSettings, ForwardProcess):
    """The method with its loss. `consistency` is our departure, 0 as published: it is added to every energy."""

    own_metrics: ClassVar[tuple[str, ...]] = ("deviation", "energy")

    def prepare(self, advantages: Tensor, groups: Tensor) -> Tensor:
        """Energies, one per image."""
        clipped = advantages.clamp(-self.advantage_clip, self.advantage_clip)
        return energies(clipped, groups, self.energy, temperature=self.temperature, clip=self.energy_clip, gate=self.gate)

    def sample_loss(self, at: Velocities, batch: "TrainingBatch") -> tuple[Tensor, dict[str, Tensor]]:
        energy = batch.advantages + self.consistency
        loss = awr_loss(at.v, at.v_old, at.v_target, batch.t, energy, adaptive=self.adaptive)
        return loss, {"deviation": velocity_kl(at.v, at.v_old), "energy": energy.abs()}
