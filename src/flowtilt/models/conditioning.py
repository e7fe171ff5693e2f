"""What a network reads of captions, each held once."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad


@dataclass(frozen=True)
class Conditioning:
    """What a network reads of N captions, a caption that many images share being held once.

    Args:
        distinct: named tensors, the first axis of each going over distinct captions.
        rows: which of them each of the N is, [N] on the CPU.
        lengths: tokens of each distinct caption, [D] on the CPU, for families that do not pad all captions alike. The second axis of
            every tensor then goes over tokens, with zeros after a caption's own.
        sources: latents of the source image of each distinct caption, [D, ...], of a family that edits.
        away: what guidance leads away from, row by row, of a family that edits; the others have one negative caption for all rows.
    """

    distinct: Mapping[str, Tensor]
    rows: Tensor
    lengths: Tensor | None = None
    sources: Tensor | None = None
    away: "Conditioning | None" = None

    def __len__(self) -> int:
        return len(self.rows)

    def select(self, index: Tensor) -> "Conditioning":
        """The rows `index` [M], repeats allowed."""
        away = None if self.away is None else self.away.select(index)
        return Conditioning(self.distinct, self.rows[index], self.lengths, self.sources, away)

    def join(self, other: "Conditioning") -> "Conditioning":
        """These rows, then the other's."""
        number = len(next(iter(self.distinct.values())))
        rows = torch.cat([self.rows, number + other.rows])
        sources = None if self.sources is None or other.sources is None else torch.cat([self.sources, other.sources])
        away = None if self.away is None or other.away is None else self.away.join(other.away)
        if self.lengths is None or other.lengths is None:
            distinct = {name: torch.cat([x, other.distinct[name]]) for name, x in self.distinct.items()}
            return Conditioning(distinct, rows, None, sources, away)
        lengths = torch.cat([self.lengths, other.lengths])
        longest = int(lengths.max())
        distinct = {name: torch.cat([_padded(x, longest), _padded(other.distinct[name], longest)]) for name, x in self.distinct.items()}
        return Conditioning(distinct, rows, lengths, sources, away)

    def tensors(self) -> dict[str, Tensor]:
        """The N rows, each repeated wherever it occurs, up to the longest of them."""
        found = {name: x[self.rows.to(x.device)] for name, x in self.distinct.items()}
        if self.lengths is None:
            return found
        longest = max(self.tokens())
        return {name: x[:, :longest] for name, x in found.items()}

    def source(self) -> Tensor:
        """Latents of the N rows' source images, [N, ...].

        Raises:
            ValueError: captions without a source image.
        """
        if self.sources is None:
            raise ValueError("sources: these captions have no source image; only a family that edits has")
        return self.sources[self.rows.to(self.sources.device)]

    def tokens(self) -> list[int]:
        """Tokens of each of the N captions.

        Raises:
            ValueError: captions that are padded alike.
        """
        if self.lengths is None:
            raise ValueError("lengths: these captions are padded alike; a family that asks for their tokens has ragged = True")
        return self.lengths[self.rows].tolist()

    def mask(self, device: torch.device) -> Tensor | None:
        """Which tokens of `tensors()` are a caption's own, [N, L] bool; none where all are."""
        tokens = torch.tensor(self.tokens())
        own = torch.arange(int(tokens.max())) < tokens[:, None]
        return None if own.all() else own.to(device)


def _padded(x: Tensor, length: int) -> Tensor:
    """x [D, l, ...] with zeros up to `length` tokens."""
    return pad(x, (0, 0) * (x.ndim - 2) + (0, length - x.shape[1]))
