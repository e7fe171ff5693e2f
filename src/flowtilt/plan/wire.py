"""Bytes between processes: what a rollout's messages carry, and how long they take over stated links.

Every message of `distributed.World` and every gathering of FSDP2 goes around a ring of the W ranks. Of a tensor of n bytes each rank sends
2 (W - 1) / W n for a sum, and (W - 1) n for the gathering of n bytes from each. `benchmarks/scale.py` compares these bytes with what
gloo really sends.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from statistics import NormalDist

from flowtilt.config import Recipe
from flowtilt.plan.machine import Machine
from flowtilt.plan.memory import Fitted, Memory
from flowtilt.plan.passes import passes_of
from flowtilt.training.image_metrics import FEATURES

LATENCY = 3e-5
"""Seconds that a message takes whatever its size, for each rank around the ring, an assumption."""


@dataclass(frozen=True)
class Message:
    """Messages of one kind in a rollout.

    Args:
        number: how many.
        sent: bytes that one rank sends in all of them.
    """

    number: float
    sent: float


def messages_of(recipe: Recipe, needed: Memory, found: Fitted) -> dict[str, Message]:
    """What one rank sends in a rollout after the first, by what it is; empty with one process."""
    size = needed.machine.gpus
    if size == 1:
        return {}
    share, updates = needed.images, recipe.optimizer.steps_per_rollout
    rewards = len(recipe.rewards)
    # scores and their absences, and what the metrics of images need, in fp32
    columns = 2 * rewards + FEATURES
    kinds = {
        "gradients": Message(updates, updates * summed(needed.costs.trained.bytes, size)),
        "scores and image metrics": Message(2 * rewards + 3, gathered(4 * columns * share, size)),
    }
    if recipe.shard == "base":
        passes = passes_per_rank(recipe, needed, found)
        shards = needed.costs.shards
        kinds["gathering of the sharded base"] = Message(passes * len(shards), passes * gathered(sum(shards) / size, size))
    return kinds


def passes_per_rank(recipe: Recipe, needed: Memory, found: Fitted) -> float:
    """How often one rank passes through the network in a rollout, whatever the rows: backward passes gather the weights once more."""
    one = passes_of(recipe, 2)
    size = needed.machine.gpus
    # the sizes found are cut to an average share, and a sharded base wants a number
    given = recipe.micro_batch if isinstance(recipe.micro_batch, int) else 0
    sample = -(-needed.part // max(given, found.micro_batches["sample"])) * (needed.images / needed.part)
    per_image = one.sample / max(1, recipe.rollout.images())
    double = 2 if recipe.rollout.guidance != 1 else 1  # both halves of a guided pass go through at once
    updates = recipe.optimizer.steps_per_rollout
    rows = _largest(recipe.rollout.trained(), updates, size) * recipe.rows_per_image()
    train = math.ceil(rows / max(given, found.micro_batches["train"])) * updates
    beside = (one.old + one.reference) / max(1, one.pairs)
    return sample * per_image / double + train * (2 + beside) if size > 1 else 0.0


def _largest(images: int, updates: int, size: int) -> float:
    """The most images of an update that one rank has, on average: an update's images are drawn at random from all ranks' shares."""
    mean = images / updates / size
    if updates == 1 or size == 1:
        return math.ceil(mean)
    deviation = math.sqrt(mean * (1 - 1 / size) * (1 - 1 / updates))
    return mean + deviation * NormalDist().inv_cdf((size - 0.375) / (size + 0.25))


def summed(count: float, size: int) -> float:
    """Bytes that one of `size` ranks sends for the sum of tensors of so many bytes."""
    return 2 * (size - 1) / size * count


def gathered(count: float, size: int) -> float:
    """Bytes that one of `size` ranks sends so that each has the `count` bytes of every rank."""
    return (size - 1) * count


def hours(messages: Mapping[str, Message], machine: Machine) -> float:
    """Hours of a rollout's messages, one after another and beside no computing."""
    sent, number = (sum(getattr(one, name) for one in messages.values()) for name in ("sent", "number"))
    return (sent / machine.slowest + number * LATENCY * (machine.gpus - 1)) / 3600
