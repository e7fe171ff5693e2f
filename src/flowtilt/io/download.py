"""Downloads that can be trusted: they go on where they were cut off, and a file appears only when its checksum is right."""

import hashlib
import http.client
import os
import shutil
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from io import FileIO
from pathlib import Path
from typing import Any

from tqdm import tqdm

from flowtilt.errors import UserError
from flowtilt.io.files import digest, disk_errors, fsync_folder
from flowtilt.io.web import RETRY_STATUSES

PAUSES = (0.5, 1.0, 2.0, 4.0)
"""Seconds before each further try; counted anew whenever bytes have come."""
TIMEOUT = 30
"""Seconds without a byte after which a connection counts as lost."""


def fetch(url: str, path: Path, *, sha256: str = "", git_blob: str = "", size: int | None = None, pauses: Sequence[float] = PAUSES) -> Path:
    """The file at `path`, fetched from `url` unless it is there already.

    It grows as `path`.part, which a later call goes on with where the server allows, and takes its name when
    size and checksum are right. Of several processes one downloads, the others wait for it.

    Args:
        sha256: hexadecimal; the whole sum or its beginning.
        git_blob: Git's id of the content, SHA-1 of "blob <length>\\0" and the content; the tree of a commit tells it.
        size: bytes.
        pauses: before each further try after a connection error.

    Raises:
        UserError: no network, refused, not found, wrong content, no space, or another file at `path`.
    """
    if path.exists():
        return _checked(path, sha256=sha256, git_blob=git_blob, size=size)
    part = path.with_name(path.name + ".part")
    with disk_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
    with _alone(part) as file:
        if path.exists():  # another process has fetched it meanwhile
            return _checked(path, sha256=sha256, git_blob=git_blob, size=size)
        older = file.tell() > 0
        _transfer(url, file, path.name, size, pauses)
        problem = wrong(part, sha256=sha256, git_blob=git_blob, size=size)
        if problem and older:  # what an earlier call left may have been of another file
            _restart(file)
            _transfer(url, file, path.name, size, pauses)
            problem = wrong(part, sha256=sha256, git_blob=git_blob, size=size)
        if problem:
            part.unlink()
            raise UserError(f"{url}: wrong content: {problem}; it was removed, try again or report it")
        with disk_errors(path):
            os.fsync(file)
            part.replace(path)
            fsync_folder(path.parent)
    return path


def wrong(path: Path, *, sha256: str = "", git_blob: str = "", size: int | None = None) -> str:
    """What of a file is not as published, with both figures; "" where all is."""
    found = path.stat().st_size
    if size is not None and found != size:
        return f"{found} bytes, expected {size}"
    if sha256 and not (found := digest(path)).startswith(sha256):
        return f"SHA-256 {found}, expected {sha256}"
    if git_blob and (found := blob_id(path)) != git_blob:
        return f"Git blob {found}, expected {git_blob}"
    return ""


def blob_id(path: Path) -> str:
    """The id under which Git stores this content, hexadecimal; what `git hash-object` prints."""
    with path.open("rb") as file:
        head = hashlib.sha1(b"blob %d\0" % path.stat().st_size, usedforsecurity=False)
        return hashlib.file_digest(file, head.copy).hexdigest()


def fetch_hub(repo: str, revision: str, files: Sequence[str], *, to: Path | None = None) -> list[Path]:
    """Files of one commit of a hub repository, each checked against the size and the sum that the hub tells.

    The first two are needed; further ones are left out where the commit has none.

    Args:
        to: folder for them; None is the hub's own cache.

    Raises:
        UserError: the hub can't be reached, refuses, lacks a needed file, or sent other content.
    """
    from huggingface_hub import hf_hub_download

    infos = _stated(repo, revision, files)
    missing = [file for file in files[:2] if file not in infos]
    if missing:
        raise UserError(f"hub repository {repo}: no {' and no '.join(missing)} in revision {revision[:12]}")
    paths = []
    for file in files:
        if file not in infos:
            continue
        with hub_errors(repo):
            path = Path(hf_hub_download(repo, file, revision=revision, local_dir=to))
        if problem := _unlike(path, infos[file]):
            path.resolve().unlink()
            path.unlink(missing_ok=True)
            raise UserError(f"hub repository {repo}: {file} is damaged: {problem}; it was removed, try again")
        paths.append(path)
    return paths


def hub_wrong(repo: str, revision: str, path: Path, file: str) -> str:
    """What of a file here is not as in a commit of a hub repository; "" where all is.

    Raises:
        UserError: the hub can't be reached, or refuses.
    """
    infos = _stated(repo, revision, [file])
    return _unlike(path, infos[file]) if file in infos else f"no {file} in that commit"


def _stated(repo: str, revision: str, files: Sequence[str]) -> dict[str, Any]:
    """What the hub says of those of the files that a commit has."""
    from huggingface_hub import HfApi

    with hub_errors(repo):
        return {info.path: info for info in HfApi().get_paths_info(repo, list(files), revision=revision)}


def _unlike(path: Path, info: Any) -> str:
    sums = {"sha256": info.lfs.sha256} if info.lfs else {"git_blob": info.blob_id}
    return wrong(path, size=info.size, **sums)


@contextmanager
def hub_errors(repo: str) -> Iterator[None]:
    """One line for whatever the hub's library raises, which comes from several packages."""
    try:
        yield
    except Exception as error:
        cause = next((line.strip() for line in str(error).splitlines() if line.strip()), "")
        where = "the network, HF_ENDPOINT and HF_HUB_OFFLINE; a gated repository needs `hf auth login`"
        raise UserError(f"hub repository {repo}: {type(error).__name__}: {cause}; check {where}") from error


def _checked(path: Path, **expected: Any) -> Path:
    if problem := wrong(path, **expected):
        raise UserError(f"{path} is there but is not the published file: {problem}; move it away to have it fetched")
    return path


@contextmanager
def _alone(part: Path) -> Iterator[FileIO]:
    """The partial file, at its end, under a lock that the system takes back from a killed process."""
    while True:
        with disk_errors(part):
            file = part.open("ab", buffering=0)  # nothing is left to flush when the disk is full
        with file:
            with suppress(OSError, ModuleNotFoundError):  # a file system without locks, or Windows; the checksum is still there
                import fcntl

                fcntl.flock(file, fcntl.LOCK_EX)
            if not _is_at(file, part):
                continue  # whoever had the lock has renamed or removed it
            file.seek(0, os.SEEK_END)  # it may have grown since it was opened
            try:
                yield file
            finally:
                if _is_at(file, part) and not part.stat().st_size:
                    part.unlink()
            return


def _is_at(file: FileIO, path: Path) -> bool:
    with suppress(FileNotFoundError):
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    return False


def _transfer(url: str, file: FileIO, name: str, size: int | None, pauses: Sequence[float]) -> None:
    """Receives until all is there, through cut connections."""
    left, furthest = list(pauses), file.tell()
    with tqdm(total=size, unit="B", unit_scale=True, desc=name, disable=None, leave=False, delay=1, dynamic_ncols=True) as bar:
        while True:
            try:
                if _receive(url, file, size, bar):
                    return
                failure = "the connection was cut"
            except urllib.error.HTTPError as error:
                if error.code == 416 and file.tell():  # nothing follows what is here: it is all, or of another file
                    if error.headers.get("Content-Range") == f"bytes */{file.tell()}":
                        return
                    _restart(file)
                    continue
                if error.code not in RETRY_STATUSES:
                    reason = "not found" if error.code in (404, 410) else "refused"
                    raise UserError(f"{url}: {reason} ({error.code})") from None
                failure = f"the server answers {error.code}"
            except (OSError, http.client.HTTPException) as error:
                failure = str(getattr(error, "reason", "") or error or type(error).__name__)
            if file.tell() > furthest:
                left, furthest = list(pauses), file.tell()
            if not left:
                raise UserError(f"{url}: {failure}, {len(pauses) + 1} times; check the network and try again")
            time.sleep(left.pop(0))


def _receive(url: str, file: FileIO, size: int | None, bar: tqdm) -> bool:
    """One request, from the file's end on; whether the file is whole now."""
    if size is not None and file.tell() > size:
        _restart(file)
    at = file.tell()
    if at and at == size:
        return True
    headers = {"User-Agent": "flowtilt", "Accept-Encoding": "identity"} | ({"Range": f"bytes={at}-"} if at else {})
    with urllib.request.urlopen(urllib.request.Request(url, headers=headers), timeout=TIMEOUT) as answer:
        if at and not (answer.status == 206 and answer.headers.get("Content-Range", "").startswith(f"bytes {at}-")):
            _restart(file)
            if answer.status == 206:
                return False
            at = 0
        length = answer.headers.get("Content-Length", "")
        total = at + int(length) if length.isdigit() else None
        if size is not None and total not in (None, size):
            raise UserError(f"{url}: wrong content: {total} bytes, expected {size}")
        _check_space(file, (total or size or at) - at)
        bar.total, bar.n, bar.initial = total or size, at, at
        while block := memoryview(answer.read1(1 << 18)):
            while block:
                with disk_errors(Path(str(file.name))):
                    block = block[file.write(block) :]
            bar.update(file.tell() - bar.n)
            if size is not None and file.tell() > size:
                _restart(file)
                raise UserError(f"{url}: wrong content: more than the expected {size} bytes")
    return total is None or file.tell() == total


def _restart(file: FileIO) -> None:
    file.seek(0)
    file.truncate()


def _check_space(file: FileIO, needed: int) -> None:
    folder = Path(str(file.name)).parent
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise UserError(f"can't write {file.name}: {needed / 1e6:,.0f} MB to come, {free / 1e6:,.0f} MB free; choose another folder")
