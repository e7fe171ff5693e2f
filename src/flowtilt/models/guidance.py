"""Classifier-free guidance."""

import torch
from torch import Tensor

from flowtilt.models.base import Drawing
from flowtilt.models.conditioning import Conditioning
from flowtilt.solvers import Velocity


def guided(drawing: Drawing, role: str, given: Conditioning, empty: Conditioning | None, guidance: float) -> Velocity:
    """v_empty + guidance (v - v_empty) as a function of x [N, ...] and sigma [] or [N]; v where `empty` is none."""
    if empty is None:
        return lambda x, sigma: drawing.velocity(role, x, sigma, given)
    both = given.join(empty.select(torch.zeros(len(given), dtype=torch.long)))

    def velocity(x: Tensor, sigma: Tensor) -> Tensor:
        v, free = drawing.velocity(role, torch.cat([x, x]), sigma.expand(len(x)).repeat(2), both).chunk(2)
        return free + guidance * (v - free)

    return velocity
