"""Pair files: JSON lines, a JSON list such as HPDv3's, Pick-a-Pic's Parquet.

The suffix names the format. Every error names the file and the row.
"""

import json
import math
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from flowtilt.errors import UserError
from flowtilt.preferences.pair import Pair, Picture, Preferences
from flowtilt.prompts.decoding import decode, visible

LINES = "pairs.jsonl"
"""The file of a folder that `flowtilt pairs` writes."""
KEYS = (("chosen", "rejected"), ("path1", "path2"))
"""The preferred image's key and the other's: ours, HPDv3's. The first pair of which a record has one counts."""
TIE = "tied"


def read_preferences(path: str | Path) -> Preferences:
    """Reads the pairs of a file or folder; every image is looked for, none is opened.

    - .jsonl, .ndjson: one object per line, {"prompt", "chosen", "rejected"} and perhaps "weight" (1), or HPDv3's keys.
    - .json: a list of such objects; HPDv3 has "prompt", "path1" (preferred), "path2".
    - .parquet: Pick-a-Pic v1 or v2; needs pyarrow.
    - a folder: its pairs.jsonl, else all of its Parquet files in the order of their names.

    Paths of images are relative to the file's folder. A pair of one and the same image is a tie and is dropped, as are Pick-a-Pic's.

    Raises:
        UserError: the file is missing or of another format, a row is no pair, an image is missing, or no pair is left.
    """
    path = Path(path)
    files = [path]
    if path.is_dir():
        files = [path / LINES] if (path / LINES).is_file() else sorted(path.rglob("*.parquet"))
        if not files:
            raise UserError(f"pairs {path}: neither {LINES} nor a .parquet file in this folder")
    pairs: list[Pair] = []
    dropped: Counter[str] = Counter()
    for file in files:
        for found in _reader(file):
            if isinstance(found, str):
                dropped[found] += 1
            else:
                pairs.append(found)
    found = Preferences(pairs, dict(dropped))
    if not pairs:
        raise UserError(f"pairs {path}: no pair in the file" + (f" ({found})" if dropped else "; write one object per line"))
    return found


def _reader(file: Path) -> Iterator[Pair | str]:
    match file.suffix.lower():
        case ".jsonl" | ".ndjson":
            return _judged(_lines(file), file.parent)
        case ".json":
            return _judged(_list(file), file.parent)
        case ".parquet":
            from flowtilt.preferences.parquet import rows

            return rows(file)
    raise UserError(f"pairs {file}: unknown kind of file; .jsonl, .json and .parquet are read (docs/guides/offline-pairs.md)")


def _text(file: Path) -> str:
    try:
        return decode(file.read_bytes(), str(file), "pairs")
    except OSError as error:
        raise UserError(f"pairs {file}: {error.strerror}; give a .jsonl, .json or .parquet file, or make one: flowtilt pairs") from None
    except ValueError as error:  # a NUL in the path
        raise UserError(f"pairs {str(file)!r}: {error}") from None


def _parsed(text: str, where: str, otherwise: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        line = "" if "\n" not in text else f" in line {error.lineno}"
        raise UserError(f"pairs {where}: not JSON{line} ({error.msg}); {otherwise}") from None
    except (ValueError, RecursionError):
        raise UserError(f"pairs {where}: JSON that can't be read: nested too deeply, or a number of too many digits") from None


def _lines(file: Path) -> Iterator[tuple[Any, str]]:
    for number, line in enumerate(_text(file).split("\n"), 1):
        if line.strip():
            where = f"{file}:{number}"
            yield _parsed(line, where, "write one object per line"), where


def _list(file: Path) -> Iterator[tuple[Any, str]]:
    whole = _parsed(_text(file), str(file), "a file of one object per line is named .jsonl")
    if not isinstance(whole, list):
        raise UserError(f"pairs {file}: not a JSON list; a file of one object per line is named .jsonl")
    for number, record in enumerate(whole, 1):
        yield record, f"{file}, entry {number}"


def _judged(records: Iterator[tuple[Any, str]], folder: Path) -> Iterator[Pair | str]:
    there: dict[str, bool] = {}
    for record, where in records:
        if not isinstance(record, dict):
            raise UserError(f'pairs {where}: not an object; write {{"prompt": "…", "chosen": "a.png", "rejected": "b.png"}}')
        better, worse = next((keys for keys in KEYS if keys[0] in record or keys[1] in record), KEYS[0])
        prompt = caption(record.get("prompt"), where)
        for key in (better, worse):
            _check_image(record, key, folder, where, there)
        weight = _weight(record.get("weight", 1.0), where)
        chosen, rejected = (folder / record[key] for key in (better, worse))
        yield TIE if chosen == rejected else Pair(prompt, Picture(chosen), Picture(rejected), weight, where)


def caption(value: Any, where: str) -> str:
    """A pair's caption.

    Raises:
        UserError: it is no text, or none at all.
    """
    if not isinstance(value, str) or not visible(value).strip():
        raise UserError(f'pairs {where}: "prompt" must be a text, not {_shown(value)}')
    if any("\ud800" <= letter <= "\udfff" for letter in value):
        raise UserError(f"pairs {where}: half of a surrogate pair in the prompt; write the character whole")
    return visible(value).strip()


def _check_image(record: dict[str, Any], key: str, folder: Path, where: str, there: dict[str, bool]) -> None:
    """Raises UserError where a record's image is not named, or not there."""
    name = record.get(key)
    if name is None:
        raise UserError(f'pairs {where}: no "{key}"; a pair has a chosen and a rejected image')
    if not isinstance(name, str) or not name:
        raise UserError(f'pairs {where}: "{key}" must be the path of an image, not {_shown(name)}')
    if name not in there:
        try:
            there[name] = (folder / name).is_file()
        except (OSError, ValueError):  # a name too long, a NUL
            there[name] = False
    if not there[name]:
        raise UserError(f'pairs {where}: no image {" ".join(name.split())[:200]} ("{key}"); paths are relative to {folder}')


def _weight(value: Any, where: str) -> float:
    try:
        good = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value) and 0 < value <= 1e6
    except OverflowError:
        good = False
    if not good:
        raise UserError(f'pairs {where}: "weight" must be a number above 0 and at most 1e6, not {_shown(value)}')
    return float(value)


def _shown(value: Any) -> str:
    text = "nothing" if value is None else repr(value)
    return text if len(text) <= 60 else f"{text[:59]}…"
