"""Prompt files: plain text, CSV and TSV, JSON lines, a JSON list.

The suffix names the format. Each reader yields prompts in the file's order, each with its file and line.
"""

import csv
import json
from collections.abc import Callable, Iterator, Mapping
from io import StringIO
from pathlib import Path
from typing import Any

from flowtilt.errors import UserError
from flowtilt.prompts.prompt import Prompt

CAPTIONS = ("prompt", "caption", "prompts", "text")
"""Columns of a table that may hold the caption, the first that it has; upper or lower case. DrawBench's is "Prompts"."""
TAGS = ("tag", "category")


def load_prompts(path: str | Path) -> list[Prompt]:
    """Reads prompts from a file.

    - .jsonl: one object a line with "prompt" and, where it has one, "tag"; GenEval's metadata, GenEval 2's questions.
    - .json: a list of captions, or of such objects.
    - .csv, .tsv: a table with a header; see `CAPTIONS` and `TAGS`.
    - anything else: text, one caption a line.

    All that is neither caption nor tag becomes metadata. Blank lines are skipped, surrounding spaces removed.
    A caption that occurs again is dropped with all that stands beside it: images are grouped by their caption.

    Raises:
        UserError: the file is missing, empty, not UTF-8, or a line of it has no caption; names the line.
    """
    found: dict[str, Prompt] = {}
    for prompt in read_prompts(path):
        found.setdefault(prompt.text, prompt)
    return list(found.values())


def read_prompts(path: str | Path) -> list[Prompt]:
    """As `load_prompts`, with repeated captions: one prompt for each line."""
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"prompts {path}: byte {error.start} is not UTF-8; save the file as UTF-8") from None
    except OSError as error:
        raise UserError(f"prompts {path}: {error.strerror}; give a text, .csv, .tsv, .jsonl or .json file") from None
    found = list(READERS.get(path.suffix.lower(), _text)(text, str(path)))
    if not found:
        raise UserError(f"prompts {path}: no prompt in the file; write one a line")
    return found


def _lines(text: str, path: str) -> Iterator[tuple[str, str]]:
    for number, line in enumerate(text.split("\n"), 1):  # splitlines would also cut at U+2028 and U+0085, inside a caption
        if line.strip():
            yield line.strip(), f"{path}:{number}"


def _text(text: str, path: str) -> Iterator[Prompt]:
    return (Prompt(line, where=where) for line, where in _lines(text, path))


def _json_lines(text: str, path: str) -> Iterator[Prompt]:
    for line, where in _lines(text, path):
        try:
            record = json.loads(line)
        except json.JSONDecodeError as error:
            raise UserError(f"prompts {where}: not JSON ({error.msg}); write one object a line") from None
        yield _from_record(record, where, 'write {"prompt": "…"} on each line')


def _json_list(text: str, path: str) -> Iterator[Prompt]:
    for record, number in _elements(text, path):
        where = f"{path}:{number}"
        if isinstance(record, str) and record.strip():
            yield Prompt(record.strip(), where=where)
        else:
            yield _from_record(record, where, 'each element is a caption or {"prompt": "…"}')


def _elements(text: str, path: str) -> Iterator[tuple[Any, int]]:
    """The elements of a JSON list, each with the line on which it begins, which json.loads does not tell."""
    try:
        whole = json.loads(text)
    except json.JSONDecodeError as error:
        raise UserError(f"prompts {path}:{error.lineno}: not JSON ({error.msg}); a file of one object a line is named .jsonl") from None
    if not isinstance(whole, list):
        raise UserError(f"prompts {path}:1: not a JSON list; a file of one object a line is named .jsonl")
    decoder, at, line = json.JSONDecoder(), text.index("["), 1 + text.count("\n", 0, text.index("["))
    for record in whole:
        start = at + 1
        while text[start] in " \t\n\r,":
            start += 1
        line += text.count("\n", at, start)
        at = decoder.raw_decode(text, start)[1] - 1
        yield record, line
        line += text.count("\n", start, at)


def _from_record(record: Any, where: str, hint: str) -> Prompt:
    if not isinstance(record, dict) or not isinstance(record.get("prompt"), str) or not record["prompt"].strip():
        raise UserError(f'prompts {where}: no "prompt" text; {hint}')
    if any("\ud800" <= letter <= "\udfff" for letter in record["prompt"]):
        raise UserError(f"prompts {where}: half of a surrogate pair in the prompt; write the character whole")
    rest = {key: value for key, value in record.items() if key not in ("prompt", "tag")}
    tag = record.get("tag")
    return Prompt(record["prompt"].strip(), "" if tag is None else str(tag), rest, where)


def _csv(text: str, path: str) -> Iterator[Prompt]:
    return _from_rows(_rows(text, path), path)


def _tsv(text: str, path: str) -> Iterator[Prompt]:
    """Quotes enclose fields if the whole file reads so; else they are text, as in PartiPrompts' `"G I G G L E" painted in …`."""
    try:
        rows = list(_rows(text, path, delimiter="\t"))
    except UserError:
        rows = list(_rows(text, path, delimiter="\t", quoting=csv.QUOTE_NONE))
    return _from_rows(iter(rows), path)


def _rows(text: str, path: str, **dialect: Any) -> Iterator[tuple[list[str], str]]:
    """The rows that hold anything, each with the place where it begins."""
    reader = csv.reader(StringIO(text, newline=""), strict=True, **dialect)
    while True:
        where = f"{path}:{reader.line_num + 1}"
        try:
            row = next(reader, None)
        except csv.Error as error:
            raise UserError(f"prompts {where}: not a readable row ({error}); check its quotes") from None
        if row is None:
            return
        if any(cell.strip() for cell in row):
            yield [cell.strip() for cell in row], where


def _from_rows(rows: Iterator[tuple[list[str], str]], path: str) -> Iterator[Prompt]:
    header, where = next(rows, ([], ""))
    if not header:
        return
    names = [name.lower() for name in header]
    caption = next((names.index(name) for name in CAPTIONS if name in names), None)
    if caption is None:
        raise UserError(f"prompts {where}: no column {', '.join(CAPTIONS[:-1])} or {CAPTIONS[-1]}; it has {', '.join(header)}")
    tag = next((names.index(name) for name in TAGS if name in names), None)
    for row, where in rows:
        if len(row) > len(header):
            raise UserError(f"prompts {where}: {len(row)} cells under {len(header)} columns; quote a caption that holds the separator")
        cells = row + [""] * (len(header) - len(row))
        if not cells[caption]:
            raise UserError(f"prompts {where}: no {header[caption]} in the row")
        rest: Mapping[str, str] = {
            name: cell for k, (name, cell) in enumerate(zip(header, cells, strict=True)) if cell and k not in (caption, tag)
        }
        yield Prompt(cells[caption], "" if tag is None else cells[tag], rest, where)


READERS: dict[str, Callable[[str, str], Iterator[Prompt]]] = {".jsonl": _json_lines, ".json": _json_list, ".csv": _csv, ".tsv": _tsv}
