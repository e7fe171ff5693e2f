"""What a checkpoint holds of a run, and how a run takes it back."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from flowtilt.config import Recipe
from flowtilt.device.micro_batch import MicroBatch
from flowtilt.policy.roles import Policy
from flowtilt.runs.checkpoint import Checkpoint
from flowtilt.training.guards import Guards
from flowtilt.training.parts import Training


@dataclass
class Clock:
    """How far a run is. `seconds` counts training alone, without evaluations, checkpoints and loading."""

    step: int = 0
    seconds: float = 0.0
    network_evaluations: int = 0


def checkpoint_of(
    clock: Clock, guards: Guards, parents: Sequence[Any], micro_batch: MicroBatch, policy: Policy, method: Training
) -> Checkpoint:
    """The whole state of a run after `clock.step` rollouts."""
    state = {
        "clock": asdict(clock),
        "optimizer_steps": {role: update.count for role, update in method.updates.items()},
        "guards": guards.state,
        "parents": parents,
        "micro_batch": micro_batch.sizes,
        "recompute": policy.recomputes,
        "method": method.state(),
    }
    tensors = {role: policy.state(role) for role in policy.roles} | {
        _optimizer_of(role): update.tensors() for role, update in method.updates.items()
    }
    return Checkpoint(clock.step, state, tensors)


def restore(found: Checkpoint, recipe: Recipe, micro_batch: MicroBatch, policy: Policy, method: Training) -> tuple[Clock, Guards]:
    """Puts weights, optimizers and the micro-batch back to a checkpoint; returns its clock and guards."""
    micro_batch.restore(found.state["micro_batch"])
    if recipe.model.recompute == "auto" and found.state["recompute"]:
        policy.recompute()
    method.load(found.state["method"])
    for role in policy.roles:
        policy.load_state(role, found.tensors[role])
    for role, update in method.updates.items():
        update.load(found.state["optimizer_steps"][role], found.tensors[_optimizer_of(role)])
    return Clock(**found.state["clock"]), Guards(recipe, found.state["guards"])


def _optimizer_of(role: str) -> str:
    """The checkpoint's file of what AdamW remembers."""
    return "optimizer" if role == "current" else f"optimizer_{role}"
