"""The micro-batch: how many rows pass through the network at once, found by trying where it is left to us."""

from collections.abc import Callable
from typing import TypeVar

import torch

from flowtilt.errors import UserError

T = TypeVar("T")
START = {"cpu": 96, "cuda": 1152}
"""Where "auto" begins. On a CPU larger batches no longer fit its caches; a GPU's memory ends the search."""


class MicroBatch:
    """The size, and work that is done with it.

    Args:
        size: rows, or "auto", which halves for good whenever memory runs out.
        device: "cpu" or "cuda".
    """

    def __init__(self, size: int | str, device: str):
        self.auto = size == "auto"
        self.size = START[device] if isinstance(size, str) else size

    def fit(self, work: Callable[[int], T]) -> T:
        """`work(size)`, begun anew with half the size where it did not fit.

        Raises:
            UserError: a fixed size, or a single row, does not fit.
        """
        while True:
            try:
                return work(self.size)
            except torch.OutOfMemoryError:
                if not self.auto or self.size == 1:
                    raise UserError(f"out of memory with micro_batch = {self.size}; lower it or model.resolution") from None
                self.size //= 2
                torch.cuda.empty_cache()
