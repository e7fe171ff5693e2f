"""Seconds, memory and operations of a step, on a CPU and on a GPU alike."""

import math
import sys
import time
from collections import defaultdict
from collections.abc import Callable
from contextlib import ExitStack
from types import TracebackType
from typing import Any
from unittest.mock import patch

import torch

from flowtilt import Trainer
from flowtilt.plan.machine import GPUS, Machine
from flowtilt.plan.memory import CONTEXT, GIB
from flowtilt.plan.plan import make_plan

VARIANTS = {"pcie", "nvl", "ti", "d", "laptop", "mig"}
"""Words in the names of GPUs whose figures are not those of their namesakes."""


def now(device: torch.device) -> float:
    """Seconds, once the device has done all it was told to.

    Of a CPU with one thread those in which it worked for this process: another's load does not lengthen them.
    """
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return _host_clock()()


def _host_clock() -> Callable[[], float]:
    return time.process_time if torch.get_num_threads() == 1 and not torch.cuda.is_available() else time.perf_counter


def clock_name() -> str:
    """What `now` reads."""
    return "CPU seconds of one thread" if _host_clock() is time.process_time else "seconds"


class Watch:
    """A context in which the parts of a trainer that compute are timed: the network forward and backward, VAE, text encoders.

    On a GPU by events in its queue, which make nobody wait: an interval ends when the device has come so far.
    """

    def __init__(self, trainer: Trainer):
        policy = trainer.policy
        self._device, self._spans, self._patches = policy.model.device, defaultdict(list), ExitStack()
        self._watched = [
            (policy, "velocity", "network forward"),
            (torch.Tensor, "backward", "network backward"),
            (policy.model, "decode", "vae"),
            (policy.model.encode, "_encode", "text encoders"),
        ]

    def __enter__(self) -> "Watch":
        for owner, name, part in self._watched:
            self._patches.enter_context(patch.object(owner, name, self._timed(getattr(owner, name), part)))
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._patches.close()

    def seconds(self) -> dict[str, float]:
        """Of each part so far."""
        now(self._device)
        return {part: sum(_between(*span) for span in self._spans[part]) for _, _, part in self._watched}

    def _timed(self, function: Callable[..., Any], part: str) -> Callable[..., Any]:
        def call(*args: Any, **keywords: Any) -> Any:
            begin = self._mark()
            result = function(*args, **keywords)
            self._spans[part].append((begin, self._mark()))
            return result

        return call

    def _mark(self) -> Any:
        if self._device.type != "cuda":
            return now(self._device)
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event


def _between(begin: Any, end: Any) -> float:
    return end - begin if isinstance(begin, float) else begin.elapsed_time(end) / 1000


def cap_memory(gib: float) -> None:
    """Lets this process have as much of the GPU as a card of `gib` would give it, beside the CUDA context."""
    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction(min(1.0, (gib * GIB - CONTEXT) / total))


def begin_memory(device: torch.device) -> None:
    """Forgets the peak so far, and gives back what nobody uses."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)


def peak_memory(device: torch.device) -> dict[str, float] | None:
    """GiB since `begin_memory`, of tensors and of what torch took from the device for them; none on a CPU."""
    if device.type != "cuda":
        return None
    return {"tensors": torch.cuda.max_memory_allocated(device) / GIB, "taken": torch.cuda.max_memory_reserved(device) / GIB}


def timed_step(trainer: Trainer) -> tuple[dict[str, float], float]:
    """A step's metrics, and its seconds.

    Raises:
        SystemExit: it trained nothing, so that its speed says nothing.
    """
    device = trainer.policy.model.device
    begin = now(device)
    metrics = trainer._step()
    seconds = now(device) - begin
    if not math.isfinite(metrics["loss"]) or metrics["skipped_updates"]:
        sys.exit(f"{trainer.recipe.name}: the loss is not finite, or an update was skipped: its speed says nothing")
    return metrics, seconds


def needed_operations(trainer: Trainer) -> dict[str, float]:
    """Floating-point operations that a step's mathematics asks of the network, whatever a loop computes twice.

    "sample": the rollout forward. "train": current policy forward and backward, old policy forward, and the reference where the
    recipe has it. As `flowtilt plan` counts them, on the average of the recipe's rollouts.
    """
    recipe, dtype = trainer.recipe, str(trainer.policy.model.network.dtype)
    model = recipe.model.model_copy(update={"recompute": False, "dtype": dtype.removeprefix("torch.")})
    work = make_plan(recipe.model_copy(update={"model": model}), Machine()).work
    return {phase: sum(work[phase].flops.values()) / recipe.rollouts for phase in ("sample", "train")}


def peak_rate() -> float | None:
    """FLOP/s of this GPU's dense 16-bit products by its maker; none where flowtilt knows no figures, and for a CPU."""
    return rate_of(torch.cuda.get_device_name()) if torch.cuda.is_available() else None


def rate_of(name: str) -> float | None:
    """As `peak_rate`, of a GPU by the name that its driver gives it."""
    words = set(name.lower().replace("-", " ").split())
    known = [key for key in GPUS if key in words]
    return GPUS[known[0]].rate("half") if known and not words & VARIANTS else None
