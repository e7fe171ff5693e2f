"""Pick-a-Pic v1 and v2, arXiv 2305.01569: Parquet files with the images inside.

Columns: caption, jpg_0 and jpg_1 (bytes), label_0 and label_1 (1 for the preferred one, 0, or .5 each for a tie), and perhaps
has_label and are_different.
"""

from collections import OrderedDict
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from flowtilt.errors import UserError
from flowtilt.io import parquet
from flowtilt.io.user_errors import in_one_line
from flowtilt.preferences.files import TIE, caption
from flowtilt.preferences.pair import Pair, Picture

NEEDED = ("caption", "jpg_0", "jpg_1", "label_0", "label_1")
IN_MEMORY = 2 * 2**30
"""Bytes of row groups kept; the least recently used go first."""


def rows(file: Path) -> Iterator[Pair | str]:
    """A file's pairs, or why a row is none. Images stay where they are.

    Raises:
        UserError: pyarrow is missing, the file can't be read or has other columns, or a row has other types.
    """
    table = parquet.opened(file, f"pairs {file}")
    names = table.schema_arrow.names
    if missing := [name for name in NEEDED if name not in names]:
        raise UserError(f"pairs {file}: no column {missing[0]}; Pick-a-Pic's has {', '.join(NEEDED)}")
    columns = [name for name in ("caption", "label_0", "label_1", "has_label", "are_different") if name in names]
    for number, record in enumerate(parquet.rows(table, columns, f"pairs {file}")):
        yield _judged(record, file, number)


def _judged(record: Mapping[str, Any], file: Path, number: int) -> Pair | str:
    where = f"{file}, row {number + 1}"
    if record.get("has_label") is False:
        return "without a label"
    if record.get("are_different") is False:
        return "of equal images"
    labels = record["label_0"], record["label_1"]
    if labels == (0.5, 0.5):
        return TIE
    if labels not in ((0, 1), (1, 0)):
        raise UserError(f"pairs {where}: label_0 and label_1 must be 1 and 0, or .5 each for a tie, not {labels[0]} and {labels[1]}")
    first, second = (Picture(file, number, name) for name in ("jpg_0", "jpg_1"))
    chosen, rejected = (first, second) if labels == (1, 0) else (second, first)
    return Pair(caption(record["caption"], where), chosen, rejected, 1.0, where)


class Cells:
    """Bytes of cells of Parquet files, read by row group."""

    def __init__(self) -> None:
        self._files: dict[Path, tuple[Any, list[int]]] = {}
        self._groups: OrderedDict[tuple[Path, int], Any] = OrderedDict()

    def __call__(self, picture: Picture) -> bytes:
        """The image of a cell.

        Raises:
            UserError: the file can't be read, or the cell holds no bytes.
        """
        file, row = picture.file, picture.row or 0
        if file not in self._files:
            table = parquet.opened(file, f"pairs {file}")
            lengths = [table.metadata.row_group(k).num_rows for k in range(table.num_row_groups)]
            self._files[file] = table, lengths
        table, lengths = self._files[file]
        group = 0
        while row >= lengths[group]:
            row, group = row - lengths[group], group + 1
        try:
            value = self._group(table, file, group)[picture.column][row].as_py()
        except Exception as error:
            raise UserError(f"can't be read: {in_one_line(error)}") from None
        value = value.get("bytes") if isinstance(value, dict) else value  # Hugging Face's image column
        if not isinstance(value, bytes):
            raise UserError(f"{picture.column} holds no image")
        return value

    def _group(self, table: Any, file: Path, group: int) -> Any:
        key = file, group
        if key not in self._groups:
            self._groups[key] = table.read_row_group(group, columns=["jpg_0", "jpg_1"])
            while len(self._groups) > 1 and sum(one.nbytes for one in self._groups.values()) > IN_MEMORY:
                self._groups.popitem(last=False)
        self._groups.move_to_end(key)
        return self._groups[key]
