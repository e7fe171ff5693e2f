"""Tables that name the image of each row, as Hugging Face's imagefolder has them."""

import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from flowtilt.errors import UserError
from flowtilt.evaluate.gather import Pair, grouped
from flowtilt.io.images import ENDINGS
from flowtilt.io.notices import notice
from flowtilt.prompts import Prompt
from flowtilt.prompts.files import read_prompts
from flowtilt.report.numbers import counted

FILES = ("file_name", "image", "path", "file", "filename", "image_path", "file_path")
"""Columns or keys that may name a row's image, upper or lower case; the first that names one of the images."""
TABLES = ("metadata.csv", "metadata.jsonl", "metadata.parquet")


def tables_of(place: Path) -> list[Path]:
    """The imagefolder tables in a folder or its subfolders of one level; [] where they name no images, as GenEval's do not."""
    found = [table for pattern in ("", "*/") for name in TABLES for table in sorted(place.glob(pattern + name)) if table.is_file()]
    return [table for table in found if table.suffix == ".parquet" or _begins_with_names(table)]


def _begins_with_names(table: Path) -> bool:
    with table.open("rb") as file:
        head = file.read(4096).lower()
    lines = head.splitlines() or [b""]
    return any(f'"{name}"'.encode() in head for name in FILES) if table.suffix == ".jsonl" else any(n.encode() in lines[0] for n in FILES)


def read_table(table: Path) -> list[Prompt]:
    """The rows of an imagefolder table.

    Raises:
        UserError: it can't be read, or has no captions.
    """
    try:
        return read_prompts(table)
    except UserError as error:
        raise UserError(f"{error}; or give the images themselves to score them without prompts") from None


def by_name(files: Sequence[Path], places: Sequence[Path], tables: Mapping[Path, Sequence[Prompt]]) -> list[Pair]:
    """Images with the prompt of the row that names them, in the order of the images; [] where no table names images.

    A name is a path from the table's folder, from a folder of `places` or from the working directory; where none of the rows
    fits so, it is the file's name in whatever folder, then the name without its ending. Logs what has no partner.

    Args:
        tables: the rows of each.

    Raises:
        UserError: a row without a name beside others with one, names of which none is of these images, two rows with one image.
    """
    rows = [(row, table) for table, members in tables.items() for row in members]
    columns = [column for column in FILES if any(_name(row, column) for row, _ in rows)]
    if not columns:
        return []
    label = " and ".join(map(str, tables))
    for key, wanted in _keys(files, places):
        known: dict[str, list[Path]] = {}
        for file in files:
            known.setdefault(key(file), []).append(file)
        for column in columns:
            found = {k: known[name] for k, (row, table) in enumerate(rows) for name in wanted(_name(row, column), table) if name in known}
            if found:
                return _paired(files, rows, column, found, label)
    first = next(row for row, _ in rows if _name(row, columns[0]))
    raise UserError(
        f'score: {first.where} names the image "{_name(first, columns[0])}", which is not among the {counted(len(files), "image")} given, '
        f"and no other row's is; give their folder, or rename the column {columns[0]} if it names no images"
    )


def _name(row: Prompt, column: str) -> str:
    value = next((value for key, value in row.metadata.items() if key.lower() == column), "")
    return value.strip().replace("\\", "/") if isinstance(value, str) and "\0" not in value else ""


def _keys(files: Sequence[Path], places: Sequence[Path]) -> list[tuple[Callable[[Path], str], Callable[[str, Path], list[str]]]]:
    """Ways to compare files with names, each as the key of a file and those that a name of a table may mean."""
    folders = [place for place in places if place.is_dir()]

    def paths(name: str, table: Path) -> list[str]:
        return [os.path.abspath(base / name) for base in (Path(), *folders, table.parent)] if name else []  # the last wins

    def names(name: str, table: Path) -> list[str]:
        return [name.rpartition("/")[2]] if name else []

    def stems(name: str, table: Path) -> list[str]:
        base = name.rpartition("/")[2]
        return [base.removesuffix(Path(base).suffix) if Path(base).suffix.lower() in ENDINGS else base] if name else []

    return [(os.path.abspath, paths), (lambda file: file.name, names), (lambda file: file.stem, stems)]


def _paired(
    files: Sequence[Path], rows: Sequence[tuple[Prompt, Path]], column: str, found: Mapping[int, Sequence[Path]], label: str
) -> list[Pair]:
    prompts: dict[Path, Prompt] = {}
    lost = []
    for k, (row, _) in enumerate(rows):
        name = _name(row, column)
        if not name:
            raise UserError(f"score: {row.where}: no {column} in the row; other rows name their images")
        if k not in found:
            lost.append(name)
            continue
        if len(found[k]) > 1:
            raise UserError(f"score: {row.where}: {name} may be {found[k][0]} or {found[k][1]}; write its path")
        file = found[k][0]
        if file in prompts:
            raise UserError(f"score: {prompts[file].where} and {row.where} both name {file}; keep one row per image")
        prompts[file] = row
    if lost:
        notice(
            f"score: {label}: {len(lost)} of {counted(len(rows), 'row')} left out, as the image is not among those given, {lost[0]} first"
        )
    if without := [file for file in files if file not in prompts]:
        notice(f"score: {len(without)} of {counted(len(files), 'image')} left out, as no row of {label} names them, {without[0]} first")
    return grouped((file, prompts[file]) for file in files if file in prompts)
