"""The micro-batch: how many rows pass through the network at once, found by trying where it is left to us."""

import gc
from collections.abc import Callable, Mapping, Sequence
from typing import Protocol, TypeVar

import torch
from torch import Tensor

from flowtilt.errors import UserError

T = TypeVar("T")


class Counter(Protocol):
    """What counts network evaluations."""

    evaluations: int


START = {"cpu": 96, "cuda": 1152}
"""Where "auto" begins. On a CPU larger batches no longer fit its caches; a GPU's memory ends the search."""
FEWEST = 4
"""Rows below which a way to need less memory is preferred to a smaller micro-batch, which would leave a GPU idle."""


def parts(number: int, size: int) -> Sequence[Tensor]:
    """Consecutive rows of `number`, at most `size` at once; none of none, where torch's `split` gives one part without rows."""
    return torch.arange(number).split(size) if number else ()


class MicroBatch:
    """Work that is done in parts, each kind of work with a size of its own.

    Args:
        size: rows, or "auto", which halves for good whenever memory runs out.
        device: "cpu" or "cuda".
    """

    def __init__(self, size: int | str, device: str):
        self.auto = size == "auto"
        self._first = START[device] if isinstance(size, str) else size
        self.sizes: dict[str, int] = {}
        """What was found so far, by kind of work."""

    def size(self, kind: str) -> int:
        """Rows that work of this kind takes at once."""
        return self.sizes.get(kind, self._first)

    def run_with_backoff(
        self, kind: str, work: Callable[[int], T], save_memory: Callable[[], bool] = lambda: False, counter: Counter | None = None
    ) -> T:
        """`work(size)`, begun anew with half the size where it did not fit.

        Args:
            save_memory: asked before a size that is small already is halved, or a fixed one given up; true where
                it found a way, and the search begins anew.
            counter: whose `evaluations` a try that failed does not count in.

        Raises:
            UserError: a fixed size, or a single row, does not fit.
        """
        before = counter.evaluations if counter else 0
        while True:
            size = self.size(kind)
            if counter:
                counter.evaluations = before
            try:
                return work(size)
            except torch.OutOfMemoryError:
                pass  # the traceback holds the tensors of what failed: go on after it is gone
            if torch.cuda.is_available():
                gc.collect()  # a checkpointed forward that failed leaves a cycle, with activations in it
                torch.cuda.empty_cache()
            if (size < 2 * FEWEST or not self.auto) and save_memory():
                self.sizes.pop(kind, None)
                continue
            if not self.auto or size == 1:
                raise UserError(f"out of memory with micro_batch = {size} ({kind}); lower it or model.resolution, or see `flowtilt plan`")
            self.sizes[kind] = size // 2

    def restore(self, sizes: Mapping[str, int]) -> None:
        """Goes on with sizes that were found before."""
        if self.auto:
            self.sizes = dict(sizes)
