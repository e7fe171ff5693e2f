"""Rows of CSV and TSV files, each with the line where it begins."""

import csv
import re
from collections.abc import Sequence
from io import StringIO
from typing import Any

from flowtilt.errors import UserError

Row = tuple[list[str], str]
"""Its cells, without spaces around them, and its file and line."""


def read_rows(text: str, path: str, delimiter: str) -> list[Row]:
    """The rows that hold anything. In CSV quotes enclose cells; in TSV only where the file shows that they do.

    Raises:
        UserError: quotes of a CSV file that do not enclose a cell; names the line.
    """
    if delimiter != "\t":
        return _rows(text, path, delimiter=delimiter, skipinitialspace=True)
    try:
        enclosed = _rows(text, path, delimiter=delimiter)
    except UserError:
        enclosed = []
    return enclosed if enclosed and _quotes_enclose(text, enclosed) else _rows(text, path, delimiter=delimiter, quoting=csv.QUOTE_NONE)


def _quotes_enclose(text: str, rows: Sequence[Row]) -> bool:
    """Whether quotes of a TSV file enclose cells, as spreadsheets write them, or belong to the captions, as in PartiPrompts'.

    A cell is enclosed because it holds a quote (then doubled), a comma or a line end; or because all are, the header's too.
    A quote that is never closed would swallow whole rows: such a cell holds a line end and a tab.
    """
    if any("\n" in cell and "\t" in cell for cells, _ in rows for cell in cells):
        return False
    quoted = [cell for line in text.split("\n") for cell in line.split("\t") if re.fullmatch(r'\s*".+"\s*', cell)]
    if any('""' in cell.strip()[1:-1] for cell in quoted):
        return True
    header = next(line for line in text.split("\n") if line.strip())
    if all(cell.strip().startswith('"') for cell in header.split("\t")):
        return True
    if any("\n" in cell for cells, _ in rows for cell in cells) and len(rows[0][0]) == 1:
        return False
    return all("," in cell for cell in quoted)


def _rows(text: str, path: str, **dialect: Any) -> list[Row]:
    found: list[Row] = []
    reader = csv.reader(StringIO(text, newline=""), strict=True, **dialect)
    while True:
        where = f"{path}:{reader.line_num + 1}"
        try:
            row = next(reader, None)
        except csv.Error as error:
            raise UserError(f"prompts {where}: not a readable row ({error}); check its quotes") from None
        if row is None:
            return found
        if any(cell.strip() for cell in row):
            found.append(([cell.strip() for cell in row], where))
