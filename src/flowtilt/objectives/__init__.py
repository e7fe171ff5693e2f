"""What a method optimises: one paper, one file. Here is only what the rest of flowtilt asks of each."""

from importlib import import_module
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

from torch import Tensor

if TYPE_CHECKING:
    from flowtilt.config import RolloutSettings
    from flowtilt.objectives.forward import ForwardProcess, Velocities
    from flowtilt.objectives.steps import Gaussians, StepProcess
    from flowtilt.policy.roles import Policy
    from flowtilt.sampling.trajectory import KeptSteps

__all__ = ["ForwardProcess", "Gaussians", "Objective", "RolloutSpec", "StepProcess", "Velocities", "ema_decay"]

_HOMES = {"ForwardProcess": "forward", "Velocities": "forward", "StepProcess": "steps", "Gaussians": "steps"}


class RolloutSpec(Protocol):
    """What a method says of the rollouts that it wants."""

    drops_flat: ClassVar[bool]
    """Whether groups whose images score alike are left out of training."""

    def keeps(self, rollout: int, settings: "RolloutSettings", seed: int) -> "KeptSteps | None":
        """The steps of rollout number `rollout`, from 0, that are stochastic and kept; none where clean samples are enough."""
        ...

    def prepare(self, advantages: Tensor, groups: Tensor) -> Tensor:
        """What stands for the advantages [N] of a rollout's images in the loss, [N]; `groups` [N] are equal for a prompt's images."""
        ...


class PlainAdvantages:
    """The `prepare` of a method that takes advantages as they are."""

    def prepare(self, advantages: "Tensor", groups: "Tensor") -> "Tensor":
        """What stands for the advantages [N] of a rollout's images in the loss, [N]; `groups` [N] are equal for a prompt's images."""
        return advantages


class Objective(RolloutSpec, Protocol):
    """A method with its loss."""

    @property
    def metrics(self) -> tuple[str, ...]:
        """Names of the metrics that `loss` returns."""
        ...

    def rows_per_image(self, steps: int) -> int:
        """How often each image of a rollout of so many solver steps is trained."""
        ...

    def loss(self, policy: "Policy", batch: Any) -> tuple[Tensor, dict[str, Tensor]]:
        """Loss [N] of a micro-batch (`batches.TrainingBatch`, or `batches.TransitionBatch` where steps are kept) and metrics [N]."""
        ...

    def after_rollout(self, policy: "Policy", optimizer_step: int) -> None:
        """Moves the data-collecting policy; `optimizer_step` counts all updates so far."""
        ...


def ema_decay(optimizer_step: int, maximum: float = 0.9) -> float:
    """Decay of the evaluated average: min((1 + s) / (10 + s), maximum), s counting optimizer steps from 0."""
    return min((1 + optimizer_step) / (10 + optimizer_step), maximum)


def __getattr__(name: str) -> Any:
    # what a user's own method subclasses, in the place where one looks for it
    if name in _HOMES:
        return getattr(import_module(f"flowtilt.objectives.{_HOMES[name]}"), name)
    raise AttributeError(f"module 'flowtilt.objectives' has no attribute {name!r}")
