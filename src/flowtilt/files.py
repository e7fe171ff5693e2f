"""Writing so that nothing is lost: a file is either the old one or the whole new one."""

import hashlib
import json
import math
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from flowtilt.errors import UserError


def write_atomic(path: Path, data: bytes | str) -> None:
    """Writes to a temporary file beside `path`, fsyncs, renames. The old file survives any failure.

    Raises:
        UserError: the disk is full or the folder cannot be written.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with disk_errors(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            with temporary.open("wb") as file:
                file.write(data.encode() if isinstance(data, str) else data)
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(path)
            fsync_folder(path.parent)
    finally:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)


def write_json(path: Path, value: Any) -> None:
    """As `write_atomic`; keys keep their order."""
    write_atomic(path, json.dumps(value, indent=1, ensure_ascii=False) + "\n")


@contextmanager
def whole_folder(path: Path) -> Iterator[Path]:
    """A temporary folder that becomes `path` once the block has ended well; an older `path` is replaced.

    Raises:
        UserError: the disk is full or cannot be written; what was at `path` is still there.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    older = path.with_name(f".{path.name}.{os.getpid()}.old")
    try:
        with disk_errors(path):
            shutil.rmtree(temporary, ignore_errors=True)
            shutil.rmtree(older, ignore_errors=True)
            temporary.mkdir(parents=True)
            yield temporary
            for file in temporary.rglob("*"):
                fsync_file(file) if file.is_file() else fsync_folder(file)
            fsync_folder(temporary)
            if path.exists():
                path.replace(older)
            temporary.replace(path)
            fsync_folder(path.parent)
    finally:
        if older.exists() and not path.exists():
            older.replace(path)
        shutil.rmtree(temporary, ignore_errors=True)
        shutil.rmtree(older, ignore_errors=True)


def clean(folder: Path) -> None:
    """Puts right what a kill in the midst of a write can leave: an old folder set aside comes back, temporary ones go."""
    for aside in folder.glob(".*.old"):
        whole = folder / aside.name.removeprefix(".").rsplit(".", 2)[0]
        if whole.exists():
            shutil.rmtree(aside)
        else:
            aside.replace(whole)
    for temporary in folder.glob(".*.tmp"):
        shutil.rmtree(temporary) if temporary.is_dir() else temporary.unlink()


@contextmanager
def disk_errors(path: Path) -> Iterator[None]:
    """Turns an OSError, or safetensors' own of the same cause, into one line."""
    try:
        yield
    except Exception as error:
        if isinstance(error, OSError) or type(error).__name__ == "SafetensorError":
            reason = getattr(error, "strerror", None) or str(error)
            raise UserError(f"can't write {path}: {reason}; free some space or choose another folder") from error
        raise


def append_line(path: Path, record: dict[str, Any]) -> None:
    """Appends one JSON object, NaN and infinity as null; a kill can leave a torn last line, which `read_lines` drops."""
    plain = {key: None if isinstance(value, float) and not math.isfinite(value) else value for key, value in record.items()}
    with disk_errors(path), path.open("a") as file:
        file.write(json.dumps(plain) + "\n")


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The JSON objects of a lines file, without a torn last one; [] where there is no file."""
    if not path.exists():
        return []
    found = []
    for line in path.read_bytes().split(b"\n"):
        with suppress(json.JSONDecodeError):
            found.append(json.loads(line))
    return found


def shown(path: str | Path) -> str:
    """A path as a message has it: from this folder on, where it lies below."""
    whole = Path(os.path.abspath(path))
    return str(whole.relative_to(Path.cwd())) if whole.is_relative_to(Path.cwd()) else str(path)


def cache_folder(variable: str, name: str) -> Path:
    """The folder that an environment variable names, else the one of this name in flowtilt's cache."""
    given = os.environ.get(variable)
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return Path(given) if given else cache / "flowtilt" / name


def digest(path: Path) -> str:
    """SHA-256 of a file, hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def fsync_file(path: Path) -> None:
    with path.open("rb") as file:
        os.fsync(file.fileno())


def fsync_folder(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
