"""Parquet files, read with pyarrow."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from flowtilt.errors import UserError
from flowtilt.io.user_errors import in_one_line

BATCH = 4096
"""Rows in memory at once."""


def opened(file: Path, label: str) -> Any:
    """A file of pyarrow's.

    Args:
        label: what the file is to the user, for messages.

    Raises:
        UserError: pyarrow is missing, or the file is no Parquet file.
    """
    try:
        import pyarrow.parquet as pq  # pyright: ignore[reportMissingImports]
    except ImportError:
        raise UserError(f"{label}: Parquet files are read with pyarrow; install it: pip install flowtilt[pairs]") from None
    try:
        return pq.ParquetFile(file)
    except Exception as error:
        raise UserError(f"{label}: can't be read as a Parquet file: {in_one_line(error)}") from None


def rows(table: Any, columns: Sequence[str], label: str) -> Iterator[dict[str, Any]]:
    """Some columns of each row.

    Raises:
        UserError: the file is torn.
    """
    batches, number = table.iter_batches(BATCH, columns=list(columns)), 0
    while True:
        try:
            found = next(batches).to_pylist()
        except StopIteration:
            return
        except Exception as error:  # pyarrow's own, of several kinds
            raise UserError(f"{label}, row {number}: can't be read: {in_one_line(error)}") from None
        yield from found
        number += len(found)
