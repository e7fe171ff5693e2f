"""Noise levels of a family: its pipeline's own rule, applied once.

    s_i = linspace(1, 1/n, n),    t_i = k s_i / (1 + (k - 1) s_i),    then a final 0

k is the shift: a constant, or e^mu where mu depends on the image's tokens and, for FLUX.2, on the number of steps n. Qwen-Image also
stretches 1 - t_i so that the last level above 0 is a given one. The stock pipeline has the same levels when it is called with
`sigmas=linspace(1, 1/n, n)`. Without `sigmas`, diffusers shifts the smallest level of a static shift twice.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from flowtilt.errors import UserError
from flowtilt.flow import sigma_schedule


@dataclass(frozen=True)
class Levels:
    """Noise levels by number of steps.

    Args:
        shift: k by number of steps.
        terminal: the last level above 0, which the others are stretched to; 0 stretches nothing.
        twice: shift the smallest level twice, as diffusers does without `sigmas`; see `stock`.
    """

    shift: Callable[[int], float]
    terminal: float = 0.0
    twice: bool = False

    @staticmethod
    def fixed(shift: float) -> "Levels":
        """Levels with one shift for every number of steps."""
        return Levels(lambda steps: shift)

    def __call__(self, steps: int) -> Tensor:
        """[steps + 1] fp32, strictly falling from 1 to 0.

        Raises:
            UserError: one step of a schedule that is stretched, which has no level between its first and its last.
        """
        levels = stock_schedule(steps, self.shift(steps)) if self.twice else sigma_schedule(steps, self.shift(steps))
        if not self.terminal:
            return levels
        if steps < 2:
            raise UserError(f"steps: this model's noise levels end at {self.terminal:g}, which takes at least 2 steps, not {steps}")
        rest = 1 - levels[:-1].double()
        return torch.cat([1 - rest * (1 - self.terminal) / rest[-1], rest.new_zeros(1)]).float()

    def at(self, u: Tensor, steps: int) -> Tensor:
        """t for u in (0, 1], as the levels are for s: shifted, then stretched as a schedule of infinitely many steps is."""
        k = self.shift(steps)
        t = k * u / (1 + (k - 1) * u)
        return self.terminal + (1 - self.terminal) * t if self.terminal else t

    def stock(self) -> "Levels":
        """Those that diffusers takes when it is called without `sigmas`, as published code for SD3 does.

        Raises:
            UserError: the shift depends on the steps; such a pipeline passes `sigmas` itself, so there is no other schedule.
        """
        if self.terminal or self.shift(2) != self.shift(50):
            raise UserError('model.levels: this family\'s pipeline has one schedule only; leave "stock" out')
        return replace(self, twice=True)

    def protocol(self) -> dict[str, object]:
        """The rule for a protocol: the shift where it is one number, and the last level where there is one."""
        few, many = self.shift(2), self.shift(50)
        shift = {"shift": few} if few == many else {"shift": f"{few:.4g} in 2 steps, {many:.4g} in 50"}
        return {**shift, **({"shift_terminal": self.terminal} if self.terminal else {}), **({"levels": "stock"} if self.twice else {})}


def stock_schedule(steps: int, shift: float) -> Tensor:
    """Noise levels of diffusers' scheduler with a static shift k and without `sigmas`: [steps + 1], fp32, falling from 1 to 0.

    s_i = linspace(1, l, n) with l = k .001 / (1 + (k - 1) .001), the smallest training level, already shifted; then shifted once more.
    """
    least = shift * 1e-3 / (1 + (shift - 1) * 1e-3)
    s = torch.linspace(1, least, steps, dtype=torch.float64)
    s = shift * s / (1 + (shift - 1) * s)
    return torch.cat([s, s.new_zeros(1)]).float()


def levels_of(config: Any, mu: Callable[[int], float]) -> Levels:
    """The rule of a pipeline's scheduler.

    Args:
        config: the scheduler's; that of a scheduler without dynamic shifting has `shift`, or `flow_shift` as DPM and UniPC solvers do.
        mu: the pipeline's, by number of steps; read with dynamic shifting alone.

    Raises:
        UserError: a spacing of levels that no published pipeline has.
    """
    for name in ("use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas", "invert_sigmas"):
        if getattr(config, name, False):
            raise UserError(f"model: its scheduler has {name}; only shifted noise levels are supported, so set it to false")
    terminal = float(getattr(config, "shift_terminal", None) or 0)
    if getattr(config, "use_dynamic_shifting", False):
        linear = getattr(config, "time_shift_type", "exponential") == "linear"
        return Levels(mu if linear else lambda steps: math.exp(mu(steps)), terminal)
    shift = getattr(config, "shift", None) or getattr(config, "flow_shift", None)
    if shift is None:
        raise UserError("model: its scheduler has no shift; give the pipeline a FlowMatchEulerDiscreteScheduler")
    return Levels(lambda steps: float(shift), terminal)


def mu_by_tokens(config: Any, tokens: int) -> float:
    """mu of FLUX.1 and most others: linear in the image's tokens, from `base_shift` to `max_shift`."""
    start, end = getattr(config, "base_image_seq_len", 256), getattr(config, "max_image_seq_len", 4096)
    low, high = getattr(config, "base_shift", 0.5), getattr(config, "max_shift", 1.15)
    slope = (high - low) / (end - start)
    return tokens * slope + (low - slope * start)
