"""Random samples, velocities and a policy with one weight, for the tests of the forward-process objectives; all in float64."""

from collections.abc import Callable
from dataclasses import dataclass, field
from types import SimpleNamespace

import torch
from torch import Tensor

from flowtilt.flow import velocity_target
from flowtilt.models.conditioning import Conditioning
from flowtilt.models.guidance import linear
from flowtilt.objectives.batches import TrainingBatch

N, SHAPE = 4, (2, 3, 3)


@dataclass
class Case:
    """Random data, noise, times, advantages and two policies' velocities."""

    x0: Tensor
    eps: Tensor
    t: Tensor
    r: Tensor
    v: Tensor
    v_old: Tensor

    @property
    def v_target(self) -> Tensor:
        return velocity_target(self.x0, self.eps)

    @property
    def advantages(self) -> Tensor:
        """Of both signs, the greatest about 1."""
        return 2 * self.r - 1


def draw(seed: int = 0) -> Case:
    rng = torch.Generator().manual_seed(seed)
    x0, eps, v, off = torch.randn(4, N, *SHAPE, generator=rng, dtype=torch.float64)
    t, r = torch.rand(2, N, generator=rng, dtype=torch.float64)
    return Case(x0, eps, 0.05 + 0.95 * t, r, v, v + 0.3 * off)


def gradient(loss: Callable[[Tensor], Tensor], at: Tensor) -> Tensor:
    """Gradient of the sum of `loss` [N] at a tensor."""
    at = at.detach().clone().requires_grad_()
    loss(at).sum().backward()
    assert at.grad is not None
    return at.grad


def slopes(loss: Callable[[Tensor], Tensor], at: Tensor, direction: Tensor, h: float = 1e-6) -> Tensor:
    """Central differences of `loss` [N] along a direction, sample by sample."""
    return (loss(at + h * direction) - loss(at - h * direction)) / (2 * h)


def along(gradients: Tensor, direction: Tensor) -> Tensor:
    """What `slopes` should find, [N]."""
    return (gradients * direction).flatten(1).sum(1) if gradients.ndim > 1 else gradients * direction


@dataclass
class LinearPolicy:
    """A policy whose velocity is a weight times x_t + t, and which keeps what it was asked."""

    weights: dict[str, Tensor]
    asked: list[str] = field(default_factory=list)
    averaged: list[tuple[str, float]] = field(default_factory=list)

    model = SimpleNamespace(guide=linear)

    def velocity(self, role: str, x: Tensor, t: Tensor, conditioning: Conditioning) -> Tensor:
        self.asked.append(role)
        return self.weights[role] * x + t.view(-1, 1, 1, 1)

    def same_version(self, a: str, b: str) -> bool:
        return torch.equal(self.weights[a], self.weights[b])

    def average(self, role: str, decay: float) -> None:
        self.averaged.append((role, decay))


def policy_and_batch(**weights: float) -> tuple[LinearPolicy, TrainingBatch]:
    case = draw()
    policy = LinearPolicy({role: torch.tensor(w, dtype=torch.float64, requires_grad=role == "current") for role, w in weights.items()})
    conditioning = Conditioning({"c": torch.zeros(N, 1)}, torch.arange(N))
    return policy, TrainingBatch(case.x0, case.eps, case.t, torch.linspace(-6, 6, N, dtype=torch.float64), conditioning)
