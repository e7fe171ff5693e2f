"""Files that survive a crash: a file is either the old one or the whole new one."""

import errno
import hashlib
import json
import math
import os
import re
import shutil
import stat
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from flowtilt.errors import UserError

_FULL = {number for name in ("ENOSPC", "EDQUOT") if (number := getattr(errno, name, None))}
_NO_FOLDER_SYNC = {errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EACCES, errno.EPERM, errno.EBADF, errno.EISDIR}
"""What systems answer that can't sync a folder: CIFS, VirtualBox, Windows."""
_TEMPORARY = re.compile(r"\.(?P<name>.+)\.\d+\.(?P<kind>tmp|old)", re.DOTALL)


def write_atomic(path: Path, data: bytes | str) -> None:
    """Writes to a temporary file beside `path`, fsyncs, renames. The old file survives any failure.

    A symbolic link stays, and the file that it leads to is replaced. Devices and FIFOs are written to.

    Raises:
        UserError: the disk is full or the folder cannot be written.
    """
    content = data.encode() if isinstance(data, str) else data
    if is_stream(path):
        with disk_errors(path):
            _write_stream(path, content)
        return
    target = _behind_link(path)
    temporary = _beside(target, "tmp")
    try:
        with disk_errors(path):
            target.parent.mkdir(parents=True, exist_ok=True)
            with temporary.open("wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(target)
            fsync_folder(target.parent)
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
    path = _behind_link(path)
    temporary, older = _beside(path, "tmp"), _beside(path, "old")
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


def _beside(path: Path, kind: str) -> Path:
    return path.with_name(f".{path.name}.{os.getpid()}.{kind}")


def _behind_link(path: Path) -> Path:
    return Path(os.path.realpath(path)) if path.is_symlink() else path


def is_stream(path: Path) -> bool:
    """Whether this is no file that another can replace: a device, a FIFO, a socket, an open descriptor."""
    if os.path.abspath(path).startswith(("/dev/std", "/dev/fd/", "/proc/")):
        return True
    try:
        mode = path.stat().st_mode
    except OSError:
        return False
    return not stat.S_ISREG(mode) and not stat.S_ISDIR(mode)


def is_stdout(path: Path) -> bool:
    """Whether the path is a name of standard output."""
    return os.path.abspath(path) in ("/dev/stdout", "/dev/fd/1", "/proc/self/fd/1")


def _write_stream(path: Path, content: bytes) -> None:
    if is_stdout(path):  # by `sys.stdout`, which is behind another descriptor in a command (`cli/output`)
        sys.stdout.flush()
        sys.stdout.buffer.write(content)
        sys.stdout.buffer.flush()
        return
    with path.open("ab") as file:  # an open descriptor may be that of a regular file, which has something in it
        file.write(content)


def made_by(name: str, kinds: str = "tmp|old") -> str | None:
    """The file or folder of which `name` is what a killed `write_atomic` or `whole_folder` leaves; none for any other name."""
    match = _TEMPORARY.fullmatch(name)
    return match["name"] if match and match["kind"] in kinds.split("|") else None


def clean(folder: Path, ours: Callable[[str], bool]) -> None:
    """Repairs what a kill in the middle of a write leaves: an old folder set aside comes back, temporary ones are deleted.

    Args:
        ours: whether flowtilt makes a file or folder of this name there; all others are left alone.
    """
    for place in sorted(folder.iterdir()) if folder.is_dir() else ():
        name = made_by(place.name)
        if name is None or not ours(name) or place.is_symlink():
            continue
        if made_by(place.name, "old") and not (folder / name).exists():
            place.replace(folder / name)
        else:
            shutil.rmtree(place) if place.is_dir() else place.unlink()


@contextmanager
def disk_errors(path: Path) -> Iterator[None]:
    """Turns an OSError while writing, or safetensors' own of the same cause, into one line."""
    try:
        yield
    except Exception as error:
        if isinstance(error, OSError) or type(error).__name__ == "SafetensorError":
            reason = getattr(error, "strerror", None) or str(error)
            raise UserError(f"can't write {path}: {reason}; {_remedy(error)}") from error
        raise


def _remedy(error: Exception) -> str:
    """What to do about a file that can't be written."""
    number = getattr(error, "errno", None)
    if number in _FULL or "No space left" in str(error):
        return "free some space or choose another folder"
    if number in (errno.EACCES, errno.EPERM):
        return "change its permissions or choose another folder"
    return "choose another folder"


@contextmanager
def read_errors(path: Path) -> Iterator[None]:
    """Turns an OSError while reading into one line."""
    try:
        yield
    except OSError as error:
        raise UserError(f"can't read {error.filename or path}: {error.strerror or error}; nothing was changed") from error


def append_line(path: Path, record: dict[str, Any]) -> None:
    """Appends one JSON object, NaN and infinity as null; a kill can leave a torn last line, which `read_lines` drops."""
    plain = {key: None if isinstance(value, float) and not math.isfinite(value) else value for key, value in record.items()}
    with disk_errors(path), path.open("a", encoding="utf-8", newline="\n") as file:
        file.write(json.dumps(plain) + "\n")


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The JSON objects of a lines file; [] where there is no file. Warns once of damaged lines before the last good one."""
    found, damaged = parse_lines(read_data(path))
    if damaged:
        number = f"line {damaged[0]} is" if len(damaged) == 1 else f"{len(damaged)} lines, the first of them {damaged[0]}, are"
        warnings.warn(f"{path}: {number} damaged and left out", stacklevel=2)
    return found


def renamed(record: dict[str, Any]) -> dict[str, Any]:
    """A line of a run's logs, or its summary, with the names of its keys since version 0.2, which counts rollouts, not steps."""
    for old, new in (("step", "rollout"), ("steps", "rollouts")):
        if old in record and new not in record:
            record = {new if key == old else key: value for key, value in record.items()}
    return record


def read_data(path: Path) -> bytes:
    """A file's bytes, none where there is no file."""
    try:
        return path.read_bytes()
    except (FileNotFoundError, NotADirectoryError):
        return b""


def parse_lines(data: bytes, parse: Callable[[bytes], Any] = json.loads) -> tuple[list[dict[str, Any]], list[int]]:
    """The JSON objects of a lines file, and the numbers of its damaged lines; a last line without its end counts as no line.

    Args:
        parse: of one line; a ValueError says that it is damaged.
    """
    lines = data.split(b"\n")
    found: list[dict[str, Any]] = []
    damaged: list[int] = []
    for number, line in enumerate(lines, 1):
        plain = line.strip(b"\0 \t\r")  # a crash of the machine leaves NUL bytes where data had not reached the disk
        if not plain:
            continue
        try:
            record = parse(plain)
        except (ValueError, RecursionError):
            record = None
        if isinstance(record, dict):
            found.append(renamed(record))
        elif number < len(lines):
            damaged.append(number)
    return found, damaged


def write_lines(path: Path, records: list[dict[str, Any]]) -> None:
    """Replaces a lines file; what was damaged in it is kept beside it, in a file of its name and ".damaged"."""
    if parse_lines(read_data(path))[1]:
        set_aside(path, copy=True)
    write_atomic(path, "".join(json.dumps(record) + "\n" for record in records))


def set_aside(path: Path, copy: bool = False) -> Path:
    """Renames a damaged file or folder to its name and ".damaged", numbered if that is taken, or copies it there."""
    aside, number = path.with_name(f"{path.name}.damaged"), 2
    while aside.exists():
        aside, number = path.with_name(f"{path.name}.damaged-{number}"), number + 1
    with disk_errors(aside):
        shutil.copy(path, aside) if copy else path.replace(aside)
    return aside


def shown(path: str | Path) -> str:
    """A path as a message has it: from this folder on, where it lies below."""
    whole = Path(os.path.abspath(path))
    return str(whole.relative_to(Path.cwd())) if whole.is_relative_to(Path.cwd()) else str(path)


def cache_folder(variable: str, name: str) -> Path:
    """The folder that an environment variable names, else the one of this name in flowtilt's cache."""
    given = os.environ.get(variable)
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return Path(given) if given else cache / "flowtilt" / name


def nearest_folder(path: Path) -> Path:
    """The path, or the nearest folder above it that exists."""
    return next(folder for folder in (path, *path.absolute().parents) if folder.exists())


def digest(path: Path) -> str:
    """SHA-256 of a file, hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def fsync_file(path: Path) -> None:
    # Windows syncs what is open for writing alone
    with path.open("r+b" if os.name == "nt" else "rb") as file:
        os.fsync(file.fileno())


def fsync_folder(path: Path) -> None:
    """Makes renames in a folder last, where the file system can."""
    try:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
    except OSError as error:
        if error.errno not in _NO_FOLDER_SYNC:
            raise
