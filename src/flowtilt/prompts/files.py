"""Prompt files: plain text, CSV and TSV, JSON lines, a JSON list.

The suffix names the format. Each reader yields prompts in the file's order, each with its file and line.
"""

import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from flowtilt.errors import UserError
from flowtilt.io.notices import notice
from flowtilt.prompts import geneval2
from flowtilt.prompts.decoding import decode, visible
from flowtilt.prompts.prompt import Prompt
from flowtilt.prompts.tables import Row, read_rows

CAPTIONS = ("prompt", "caption", "prompts", "text")
"""Columns of a table, or keys of its first JSON object, that may hold the caption, the first that it has. DrawBench's is "Prompts"."""
TAGS = ("tag", "category")
IMAGE = "image"
"""The column or key with the source image of an edit."""
DELIMITERS = {".csv": ",;\t", ".tsv": "\t,;"}
"""What may part the cells of a table, by suffix; the first with which the header has a caption. Excel writes semicolons and tabs, too."""


def load_prompts(path: str | Path, *, quiet: bool = False) -> list[Prompt]:
    """Reads prompts from a file.

    - .jsonl, .ndjson: one object per line with "prompt" (see `CAPTIONS`) and perhaps "tag"; GenEval's metadata, GenEval 2's questions.
    - .json: a list of captions, or of such objects.
    - .csv, .tsv: a table with a header; see `CAPTIONS` and `TAGS`.
    - anything else: text, one caption per line.

    All that is neither caption nor tag becomes metadata. A column or key "image" names the source image of an edit, relative to
    the file. Blank lines are skipped, surrounding spaces and invisible characters removed. A caption that occurs again, of an edit
    with the same image, is left out with everything beside it: images are grouped by their caption.

    Args:
        quiet: do not log what was left out.

    Raises:
        UserError: the file is missing, empty, not text, or a line of it has no caption; names the line.
    """
    found: dict[str, Prompt] = {}
    folder = os.path.dirname(os.path.abspath(path))
    prompts = [_with_source(prompt, folder) for prompt in read_prompts(path, quiet=quiet)]
    repeated = [prompt for prompt in prompts if found.setdefault(prompt.key, prompt) is not prompt]
    if repeated and not quiet:
        notice(f"prompts {path}: {len(repeated)} of {len(prompts)} captions repeat an earlier one and are left out, {_first(repeated)}")
    return list(found.values())


def _with_source(prompt: Prompt, folder: str) -> Prompt:
    """The prompt with the file of its source image, where its line names one.

    Raises:
        UserError: it is no name of a file.
    """
    name = next((value for key, value in prompt.metadata.items() if key.lower() == IMAGE), None)
    if name in (None, ""):
        return prompt
    if not isinstance(name, str) or "\0" in name:
        raise UserError(f'prompts {prompt.where}: "{IMAGE}" must be the name of an image file, not {json.dumps(name)[:80]}')
    return replace(prompt, image=os.path.join(folder, name.strip()))


def read_prompts(path: str | Path, *, quiet: bool = False, caption: str | None = None) -> list[Prompt]:
    """As `load_prompts`, with repeated captions: one prompt for each line.

    Args:
        caption: the column or key with the captions; none takes the first of `CAPTIONS` that there is.
    """
    path = Path(path)
    try:
        data = path.read_bytes()
    except OSError as error:
        raise UserError(f"prompts {path}: {error.strerror}; give a text, .csv, .tsv, .jsonl or .json file") from None
    except ValueError as error:  # a NUL in the path
        raise UserError(f"prompts {str(path)!r}: {error}; give a text, .csv, .tsv, .jsonl or .json file") from None
    lines = decode(data, str(path)).split("\n")
    cleaned = [visible(line) for line in lines]
    reader = READERS.get(path.suffix.lower(), _text)
    found = list(reader("\n".join(cleaned), str(path), caption))
    if not found:
        raise UserError(f"prompts {path}: no prompt in the file; write one per line")
    if not quiet:
        altered = [number for number, (line, clean) in enumerate(zip(lines, cleaned, strict=True), 1) if line != clean]
        if altered:
            notice(f"prompts {path}: invisible characters removed from {_lines_of(len(altered))}, line {altered[0]} first")
        _notice_doubts(path, found, plain=reader is _text)
    return found


def _notice_doubts(path: Path, prompts: list[Prompt], plain: bool) -> None:
    """Logs captions that may not be meant as such."""
    if plain and (comments := [prompt for prompt in prompts if prompt.text.startswith(("# ", "// "))]):
        notice(
            f"prompts {path}: {_lines_of(len(comments))} beginning with # or // read as captions, {_first(comments)}; there are no comments"
        )
    if long := [prompt for prompt in prompts if "\n" in prompt.text]:
        notice(f"prompts {path}: {len(long)} of {len(prompts)} captions hold a line end, {_first(long)}; check the quotes if none should")


def _lines_of(number: int) -> str:
    return f"{number} line" if number == 1 else f"{number} lines"


def _first(prompts: list[Prompt]) -> str:
    return f"line {prompts[0].where.rpartition(':')[2]} first"


def _lines(text: str, path: str) -> Iterator[tuple[str, str]]:
    for number, line in enumerate(text.split("\n"), 1):  # splitlines would also cut at U+2028 and U+0085, inside a caption
        if line.strip():
            yield line.strip(), f"{path}:{number}"


def _text(text: str, path: str, caption: str | None) -> Iterator[Prompt]:
    for k, (line, where) in enumerate(_lines(text, path)):
        if k == 0 and line.startswith("{") and _is_record(line):
            raise UserError(f"prompts {where}: a JSON object in a text file; name the file .jsonl")
        yield Prompt(line, where=where)


def _is_record(line: str) -> bool:
    try:
        return isinstance(json.loads(line), dict)
    except (ValueError, RecursionError):
        return False


def _json_lines(text: str, path: str, caption: str | None) -> Iterator[Prompt]:
    key = caption or ""
    for line, where in _lines(text, path):
        try:
            record = json.loads(line)
        except json.JSONDecodeError as error:
            raise UserError(f"prompts {where}: not JSON ({error.msg}); write one object per line") from None
        except (ValueError, RecursionError) as error:
            raise _unusual(where, error) from None
        key = key or _caption_key(record)
        yield _from_record(record, key, where, 'write {"prompt": "…"} on each line', caption)


def _json_list(text: str, path: str, caption: str | None) -> Iterator[Prompt]:
    key = caption or ""
    for record, number in _elements(text, path):
        where = f"{path}:{number}"
        if isinstance(record, str) and visible(record).strip():
            yield _prompt(record, where)
        else:
            key = key or _caption_key(record)
            yield _from_record(record, key, where, 'each element is a caption or {"prompt": "…"}', caption)


def _elements(text: str, path: str) -> Iterator[tuple[Any, int]]:
    """The elements of a JSON list, each with the line on which it begins, which json.loads does not give."""
    try:
        whole = json.loads(text)
    except json.JSONDecodeError as error:
        raise UserError(f"prompts {path}:{error.lineno}: not JSON ({error.msg}); a file of one object per line is named .jsonl") from None
    except (ValueError, RecursionError) as error:
        raise _unusual(path, error) from None
    if not isinstance(whole, list):
        raise UserError(f"prompts {path}:1: not a JSON list; a file of one object per line is named .jsonl")
    decoder, at, line = json.JSONDecoder(), text.index("["), 1 + text.count("\n", 0, text.index("["))
    for record in whole:
        start = at + 1
        while text[start] in " \t\n\r,":
            start += 1
        line += text.count("\n", at, start)
        at = decoder.raw_decode(text, start)[1] - 1
        yield record, line
        line += text.count("\n", start, at)


def _unusual(where: str, error: Exception) -> UserError:
    """The error of JSON that is well formed and can't be read: deep nesting, an integer of thousands of digits."""
    why = "nested too deeply" if isinstance(error, RecursionError) else "an integer of too many digits"
    return UserError(f"prompts {where}: JSON that can't be read ({why}); write text or a smaller number")


def _caption_key(record: Any) -> str:
    return next((key for key in CAPTIONS if isinstance(record, dict) and isinstance(record.get(key), str)), "prompt")


def _from_record(record: Any, key: str, where: str, hint: str, asked: str | None) -> Prompt:
    if asked and isinstance(record, dict) and key not in record:
        raise UserError(f"prompts {where}: no column {key!r}; it has {', '.join(record)[:200]}")
    if not isinstance(record, dict) or not isinstance(record.get(key), str) or not visible(record[key]).strip():
        raise UserError(f'prompts {where}: no "{key}" text; {hint}')
    rest = {name: value for name, value in record.items() if name not in (key, "tag")}
    tag = record.get("tag")
    if isinstance(tag, dict | list):
        raise UserError(f'prompts {where}: "tag" must be text')
    try:
        json.dumps(rest, ensure_ascii=False).encode()  # it is kept beside images and sent to reward servers
    except UnicodeEncodeError:
        raise UserError(f"prompts {where}: half of a surrogate pair; write the character whole") from None
    except (ValueError, RecursionError) as error:
        raise _unusual(where, error) from None
    return _prompt(record[key], where, geneval2.tag_of(record) if tag is None else str(tag), rest)


def _prompt(caption: str, where: str, tag: str = "", rest: Mapping[str, Any] | None = None) -> Prompt:
    """A prompt from JSON, whose escapes can spell what the file itself does not hold."""
    if any("\ud800" <= letter <= "\udfff" for letter in caption + tag):
        raise UserError(f"prompts {where}: half of a surrogate pair in the prompt; write the character whole")
    return Prompt(visible(caption).strip(), visible(tag).strip(), rest or {}, where)


def _table(text: str, path: str, caption: str | None) -> Iterator[Prompt]:
    captions = (caption.lower(),) if caption else CAPTIONS
    return _from_rows(read_rows(text, path, _delimiter(text, DELIMITERS[Path(path).suffix.lower()], captions)), captions)


def _delimiter(text: str, known: str, captions: Sequence[str]) -> str:
    header = next((line for line in text.split("\n") if line.strip()), "")
    for delimiter in known:
        if any(cell.strip(' "').lower() in captions for cell in header.split(delimiter)):
            return delimiter
    return known[0]


def _from_rows(rows: list[Row], captions: Sequence[str]) -> Iterator[Prompt]:
    if not rows:
        return
    header, where = rows[0]
    names = [name.lower() for name in header]
    caption = next((names.index(name) for name in captions if name in names), None)
    if caption is None:
        has = ", ".join(header)
        has = has if len(has) <= 200 else f"{has[:199]}…"
        rather = "; add a header, or name a file of one caption per line .txt" if captions == CAPTIONS else ""
        raise UserError(
            f"prompts {where}: no column {' or '.join(filter(None, (', '.join(captions[:-1]), captions[-1])))}; it has {has}{rather}"
        )
    tag = next((names.index(name) for name in TAGS if name in names), None)
    for row, where in rows[1:]:
        if len(row) > len(header):
            raise UserError(f"prompts {where}: {len(row)} cells under {len(header)} columns; quote a caption that holds the separator")
        cells = row + [""] * (len(header) - len(row))
        if not cells[caption]:
            raise UserError(f"prompts {where}: no {header[caption]} in the row")
        rest: Mapping[str, str] = {
            name: cell for k, (name, cell) in enumerate(zip(header, cells, strict=True)) if cell and k not in (caption, tag)
        }
        yield Prompt(cells[caption], "" if tag is None else cells[tag], rest, where)


READERS: dict[str, Callable[[str, str, str | None], Iterator[Prompt]]] = {
    ".jsonl": _json_lines,
    ".ndjson": _json_lines,
    ".json": _json_list,
    ".csv": _table,
    ".tsv": _table,
}
