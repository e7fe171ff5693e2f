"""Where a step's seconds go."""

import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch


class Phases:
    """Seconds by phase of one step, a phase inside another counting for itself alone.

    On a GPU each phase waits for its own work, so that they add up.
    """

    def __init__(self, device: torch.device):
        self._device = device
        self._begin = time.perf_counter()
        self._inner = [0.0]
        self.seconds: dict[str, float] = dict.fromkeys(("encode", "sample", "decode", "reward", "train", "sync"), 0.0)

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        begin = time.perf_counter()
        self._inner.append(0.0)
        yield
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        spent = time.perf_counter() - begin
        self.seconds[name] += spent - self._inner.pop()
        self._inner[-1] += spent

    def finish(self) -> tuple[float, dict[str, float]]:
        """Seconds since the start, and by phase with what is left as "other"."""
        total = time.perf_counter() - self._begin
        return total, {**self.seconds, "other": total - sum(self.seconds.values())}
