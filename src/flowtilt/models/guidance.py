"""Classifier-free guidance."""

import torch
from torch import Tensor

from flowtilt.models.base import RoleModel
from flowtilt.models.conditioning import Conditioning
from flowtilt.solvers import Velocity


def linear(v: Tensor, free: Tensor, guidance: float) -> Tensor:
    """free + guidance (v - free), the rule of most families; `guidance` = 1 is v."""
    return free + guidance * (v - free)


def rescaled(v: Tensor, free: Tensor, guidance: float) -> Tensor:
    """The linear rule at the norm of v, both norms over the last axis: of a token's channels, where tokens are last but one."""
    both = linear(v, free, guidance)
    return both * (v.norm(dim=-1, keepdim=True) / both.norm(dim=-1, keepdim=True))


def guided(drawing: RoleModel, role: str, given: Conditioning, negative: Conditioning | None, guidance: float) -> Velocity:
    """The velocity guided away from the `negative` caption by the family's rule, as a function of x [N, ...] and sigma [] or [N].

    Without `negative` it is the plain one. An edit is guided away from its own `given.away`.
    """
    if negative is None:
        return lambda x, sigma: drawing.velocity(role, x, sigma, given)
    both = given.join(negative.select(torch.zeros(len(given), dtype=torch.long)) if given.away is None else given.away)

    def velocity(x: Tensor, sigma: Tensor) -> Tensor:
        v, free = drawing.velocity(role, torch.cat([x, x]), sigma.expand(len(x)).repeat(2), both).chunk(2)
        return drawing.model.guide(v, free, guidance)

    return velocity
