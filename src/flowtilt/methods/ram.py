"""Reinforce adjoint matching, arXiv 2605.10759. The loss: objectives/ram.py."""

from typing import ClassVar, Literal

from pydantic import Field

from flowtilt.methods.base import WEIGHT
from flowtilt.methods.forward import ForwardSettings


class RAMSettings(ForwardSettings):
    type: Literal["ram"] = "ram"
    """The method; "ram" is reinforce adjoint matching, arXiv 2605.10759."""
    multiplier: float = Field(default=50.0, gt=0, le=WEIGHT)
    """m: the reference is tilted by exp(m reward), for rewards in their own unit: `advantage = "none"`. One over the KL's temperature."""
    old_policy: Literal["copy", "linear", "short", "delayed"] = "copy"
    """As for "nft"; "copy" samples from the trained policy, as published."""

    objective: ClassVar[str] = "flowtilt.objectives.ram:RAM"
    hold: ClassVar[str] = "lower objective.multiplier"
    most_lag: ClassVar[int] = 0
    """The target is an expectation under the trained policy, without a ratio to correct for another."""

    reads_reference: ClassVar[bool] = True

    @property
    def reference(self) -> bool:
        """Always: it is in the target."""
        return True
