"""What a network reads of captions, each held once."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Conditioning:
    """What a network reads of N captions, a caption that many images share being held once.

    Args:
        distinct: named tensors, the first axis of each going over distinct captions.
        rows: which of them each of the N is, [N] on the CPU.
    """

    distinct: Mapping[str, Tensor]
    rows: Tensor

    def __len__(self) -> int:
        return len(self.rows)

    def select(self, index: Tensor) -> "Conditioning":
        """The rows `index` [M], repeats allowed."""
        return Conditioning(self.distinct, self.rows[index])

    def join(self, other: "Conditioning") -> "Conditioning":
        """These rows, then the other's."""
        number = len(next(iter(self.distinct.values())))
        distinct = {name: torch.cat([x, other.distinct[name]]) for name, x in self.distinct.items()}
        return Conditioning(distinct, torch.cat([self.rows, number + other.rows]))

    def tensors(self) -> dict[str, Tensor]:
        """The N rows, each repeated wherever it occurs."""
        return {name: x[self.rows.to(x.device)] for name, x in self.distinct.items()}
