"""A preference: a caption, the image that was chosen and the one that was not."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple


class Picture(NamedTuple):
    """Where an image is: a file, or a cell of a Parquet file.

    Args:
        row: of the Parquet file, from 0; none for a file of its own.
        column: of that row.
    """

    file: Path
    row: int | None = None
    column: str = ""


class Pair(NamedTuple):
    """One preference.

    Args:
        weight: of its loss, above 0.
        where: file and row that it came from, for messages.
    """

    prompt: str
    chosen: Picture
    rejected: Picture
    weight: float = 1.0
    where: str = ""


@dataclass(frozen=True)
class Preferences:
    """The pairs of a file in its order.

    Args:
        dropped: rows that are no preference, by why: a tie, no label.
    """

    pairs: Sequence[Pair]
    dropped: Mapping[str, int] = field(default_factory=dict)

    def __str__(self) -> str:
        """As a line for a person: "1,204 pairs; 31 rows left out: 30 tied, 1 without a label"."""
        left = sum(self.dropped.values())
        why = ", ".join(f"{number:,} {name}" for name, number in self.dropped.items())
        rows = "1 row" if left == 1 else f"{left:,} rows"
        pairs = "1 pair" if len(self.pairs) == 1 else f"{len(self.pairs):,} pairs"
        return pairs + (f"; {rows} left out: {why}" if left else "")
