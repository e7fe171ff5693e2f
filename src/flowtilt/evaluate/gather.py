"""Image files of a folder, in the order of their names."""

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

from flowtilt.errors import UserError
from flowtilt.io.images import ENDINGS
from flowtilt.io.notices import notice
from flowtilt.io.run_folder import EvaluationFolder
from flowtilt.prompts import Prompt
from flowtilt.report.numbers import counted

TEXTS = (
    ".csv",
    ".html",
    ".json",
    ".jsonl",
    ".log",
    ".md",
    ".parquet",
    ".py",
    ".safetensors",
    ".toml",
    ".tsv",
    ".txt",
    ".xml",
    ".yaml",
    ".yml",
)
"""Endings of files that lie beside images and that nobody expects to be scored."""


VARIANTS = ("tuned", "base")


@dataclass(frozen=True)
class Pair:
    """An image file, its prompt, which prompt that is of which set, which image of it, and who drew it."""

    file: Path
    prompt: Prompt
    index: int
    copy: int
    set: str = "images"
    variant: str = "tuned"


def by_number(path: Path) -> list[tuple[int, str]]:
    """A key that sorts 2.png before 10.png."""
    return [(int(part), "") if part.isdecimal() and len(part) < 1000 else (-1, part) for part in re.split(r"(\d+)", str(path))]


def images_in(place: Path) -> list[Path]:
    """The images of a folder and its subfolders, without hidden ones and the small pictures of evaluations; logs what else is left out.

    Raises:
        UserError: there are none.
    """
    small = {EvaluationFolder(protocol.parent).pictures for protocol in place.rglob(EvaluationFolder.protocol)}
    files = [file for file in place.rglob("*") if not hidden(file, place) and not small.intersection(file.parents) and file.is_file()]
    found = sorted((file for file in files if file.suffix.lower() in ENDINGS), key=by_number)
    others = sorted((file for file in files if file.suffix.lower() not in (*ENDINGS, *TEXTS)), key=by_number)
    if others:
        notice(f"score: {place}: {counted(len(others), 'file')} left out, by their names no images that can be read, {others[0]} first")
    if not found:
        raise UserError(f"score: no images in {place}; they end in {', '.join(ENDINGS)}")
    return found


def hidden(file: Path, place: Path) -> bool:
    """Whether a file of a folder, or a folder between them, is hidden, as .ipynb_checkpoints is, or is macOS's beside an archive."""
    return any(part.startswith(".") or part == "__MACOSX" for part in file.relative_to(place).parts)


def grouped(rows: Iterable[tuple[Path, Prompt]], pair: Callable[..., Pair] = Pair) -> list[Pair]:
    """Pairs in which equal captions are one prompt; rows that say `variant`, as those of `flowtilt sample`, are counted for each."""
    indices: dict[str, int] = {}
    copies: dict[tuple[str, str], int] = {}
    found = []
    for file, prompt in rows:
        said = prompt.metadata.get("variant")
        variant = said if said in VARIANTS else VARIANTS[0]
        index = indices.setdefault(prompt.text, len(indices))
        copy = copies[prompt.text, variant] = copies.get((prompt.text, variant), -1) + 1
        found.append(pair(file, prompt, index, copy, variant=variant))
    return found
