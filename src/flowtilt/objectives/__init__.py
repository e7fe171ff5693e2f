"""What a method optimises: one paper, one file. Here is only what the rest of flowtilt asks of each."""

from typing import TYPE_CHECKING, Any, ClassVar, Protocol

from torch import Tensor

if TYPE_CHECKING:
    from flowtilt.policy.roles import Policy


class Collecting(Protocol):
    """What a method says of the rollouts that it wants."""

    drops_flat: ClassVar[bool]
    """Whether groups whose images score alike are left out of training."""

    def stochastic(self, rollout: int, steps: int, seed: int) -> range:
        """The steps of rollout number `rollout`, from 0, that draw noise and are kept for training; none where clean samples are enough."""
        ...


class Objective(Collecting, Protocol):
    """A method over its settings."""

    @property
    def metrics(self) -> tuple[str, ...]:
        """Names of the metrics that `loss` returns."""
        ...

    def loss(self, policy: "Policy", batch: Any) -> tuple[Tensor, dict[str, Tensor]]:
        """Loss [N] of a micro-batch (`rollout.TrainingBatch`, or `trajectory.TransitionBatch` where steps are kept) and metrics [N]."""
        ...

    def after_rollout(self, policy: "Policy", optimizer_step: int) -> None:
        """Moves the data-collecting policy; `optimizer_step` counts all updates so far."""
        ...


def ema_decay(optimizer_step: int, maximum: float = 0.9) -> float:
    """Decay of the evaluated average: min((1 + s) / (10 + s), maximum), s counting optimizer steps from 0."""
    return min((1 + optimizer_step) / (10 + optimizer_step), maximum)
