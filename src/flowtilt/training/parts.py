"""What a method is handed to train with, and what it gives back."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from flowtilt.config import Recipe
from flowtilt.device.micro_batch import MicroBatch
from flowtilt.distributed.world import World
from flowtilt.lora import Lora
from flowtilt.policy.roles import Policy
from flowtilt.prompts import PromptWalk
from flowtilt.rewards import Reward
from flowtilt.training.optimizer import RoleOptimizer
from flowtilt.training.preview import Preview
from flowtilt.training.rollout_log import RolloutLog
from flowtilt.training.timing import Phases


@dataclass(frozen=True)
class Parts:
    """Everything that a method may train with.

    Args:
        resume: the folder of the run that goes on; none for a new one.
        show: takes the first images of each rollout; none where nobody looks.
        log: writes rollouts; none where that is not asked for.
    """

    recipe: Recipe
    policy: Policy
    walk: PromptWalk
    rewards: Mapping[str, Reward]
    world: World
    micro_batch: MicroBatch
    resume: Path | None = None
    show: Callable[[Preview], None] | None = None
    log: RolloutLog | None = None


class Training(Protocol):
    """A method at work: what the trainer steps, logs and saves."""

    @property
    def images(self) -> int:
        """Images that a step samples."""
        ...

    @property
    def updates(self) -> Mapping[str, RoleOptimizer]:
        """By the role whose weights they move; "current" is one of them."""
        ...

    @property
    def base_loras(self) -> Mapping[str, Lora]:
        """The LoRA that a further role was put on, by role; a run keeps a copy of each."""
        ...

    def step(self, step: int, phases: Phases) -> dict[str, float]:
        """Step number `step`, from 1; returns metrics."""
        ...

    def state(self) -> dict[str, Any]:
        """What a checkpoint needs of it beside weights and optimizers, as JSON."""
        ...

    def load(self, state: Mapping[str, Any]) -> None:
        """Goes on from a checkpoint's `state`."""
        ...

    def close(self) -> None:
        """Ends what goes on in the background; `step` may be called again."""
        ...
