"""One writer per folder: a lock that the system takes back from a killed process, and a note of who holds it.

Beside the lock lies the note, since a locked file can't be read everywhere. The lock file stays: whoever deleted it could
let two processes in, one of them waiting for the file that is gone.

A shared file system may have no locks, or locks that other machines don't see. So the holder touches its note every few seconds,
and a note of another machine's is watched for a while: one that is touched has an owner, one that is not was left by a kill.
"""

import errno
import gc
import json
import os
import socket
import sys
import threading
import time
from contextlib import suppress
from datetime import datetime
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from flowtilt.errors import UserError
from flowtilt.io.files import disk_errors, write_atomic

LOCK, HOLDER = ".lock", ".holder.json"
FILES = (LOCK, HOLDER)
"""What a lock adds to its folder."""
_NO_LOCKS = (errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOLCK, errno.EINVAL)
"""What file systems without locks answer."""
BEAT = 5.0
"""Seconds after which a holder touches its note again."""
WATCH = 4 * BEAT
"""Seconds that the note of another machine is watched, for which it may be cached."""


class Hold:
    """A folder that only this process writes to, until `release` or the end of the process, however it ends.

    Where the file system has no locks, the note alone keeps others on the same machine away.

    Args:
        folder: has to exist.
        what: who writes there, for the message to others.
        patience: seconds to wait for another process that is just ending.

    Raises:
        UserError: another process holds it, or no lock file can be made; the message says who, where and since when.
    """

    def __init__(self, folder: Path, what: str, patience: float = 0.0):
        self.folder, self._what, self._pid = folder, what, os.getpid()
        self._lock: Any = None
        self._stopped = threading.Event()
        lock = FileLock(folder / LOCK, thread_local=False, fallback_to_soft=False)
        with disk_errors(folder / LOCK):
            try:
                self._acquire(lock, patience)
            except Timeout:
                raise self._refusal() from None
            except OSError as error:
                if error.errno not in _NO_LOCKS:
                    raise
                self._without_lock()
            if self._is_alive_elsewhere():
                self._let_go(lock)
                raise self._refusal()
        self._lock = lock
        started = datetime.now().astimezone().isoformat(" ", "seconds")
        try:
            write_atomic(
                folder / HOLDER, json.dumps({"pid": self._pid, "host": socket.gethostname(), "since": started, "what": what, "beats": BEAT})
            )
        except UserError:
            self.release()
            raise
        threading.Thread(target=_beat, args=(folder / HOLDER, self._stopped), daemon=True).start()

    def _is_alive_elsewhere(self) -> bool:
        """Whether a process on another machine touches the note now."""
        note, holder = self.folder / HOLDER, _holder(self.folder)
        if not holder.get("beats") or holder.get("host") == socket.gethostname():
            return False
        print(
            f"flowtilt: {self.folder}: waiting up to {WATCH:.0f} s to see whether {_described(holder)} has ended",
            file=sys.stderr,
            flush=True,
        )
        end, first = time.monotonic() + WATCH, _touched(note)
        while first is not None and time.monotonic() < end:
            time.sleep(BEAT / 5)
            if (now := _touched(note)) != first:
                return now is not None
        return False

    @staticmethod
    def _let_go(lock: Any) -> None:
        with suppress(OSError):
            lock.release(force=True)

    def _acquire(self, lock: Any, patience: float) -> None:
        try:
            lock.acquire(timeout=patience)
        except Timeout:
            if not _is_this_process(_holder(self.folder)):
                raise
            gc.collect()  # an object that nobody uses any more may hold it
            lock.acquire(timeout=0)

    def _without_lock(self) -> None:
        holder = _holder(self.folder)
        if holder.get("host") == socket.gethostname() and _is_alive(holder.get("pid")):
            raise self._refusal()
        if holder and not holder.get("beats"):
            print(
                f"flowtilt: {self.folder}: its file system has no locks; make sure that {_described(holder)} has ended",
                file=sys.stderr,
                flush=True,
            )

    def _refusal(self) -> UserError:
        holder = _holder(self.folder)
        if _is_this_process(holder):
            return UserError(
                f"{self.folder}: held by {holder.get('what', 'another')} of this very process since {holder.get('since')}; "
                "call close() on the object that holds it"
            )
        return UserError(f"{self.folder}: held by {_described(holder)}; wait until it ends or stop it, or choose another folder")

    def release(self) -> None:
        """Lets others write there. Does nothing the second time, or in a forked process."""
        lock, self._lock = self._lock, None
        if lock is None or os.getpid() != self._pid:
            return
        self._stopped.set()
        with suppress(OSError):  # the folder may be gone
            (self.folder / HOLDER).unlink(missing_ok=True)
        self._let_go(lock)

    def __del__(self) -> None:
        if getattr(self, "_lock", None) is not None:
            self.release()


def _beat(note: Path, stopped: threading.Event) -> None:
    """Touches the note until `stopped`, or until it is gone."""
    while not stopped.wait(BEAT):
        try:
            os.utime(note)
        except FileNotFoundError:
            return
        except OSError:  # a server that is away for a while
            continue


def _touched(note: Path) -> int | None:
    """When the note was touched; none where it is gone."""
    try:
        with note.open("rb"):  # by which a network's file system asks its server anew
            return note.stat().st_mtime_ns
    except OSError:
        return None


def is_held(folder: Path) -> bool:
    """Whether a process writes to the folder now.

    Nothing is written, and the lock is tried for an instant only where a note says that somebody holds it. Where the file
    system has no locks, or forbids the trial, the note is believed as long as its process lives.
    """
    holder = _holder(folder)
    if not holder or (holder.get("host") == socket.gethostname() and not _is_alive(holder.get("pid"))):
        return False  # whoever was killed left the note; a trial could be in the way of one that resumes just now
    lock = FileLock(folder / LOCK, thread_local=False, fallback_to_soft=False)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        return True
    except OSError:
        return holder.get("host") != socket.gethostname() or _is_alive(holder.get("pid"))
    lock.release(force=True)
    return False


def _holder(folder: Path) -> dict[str, Any]:
    """The note of a folder; empty where there is none, or none that can be read."""
    with suppress(OSError, ValueError):
        found = json.loads((folder / HOLDER).read_bytes())
        if isinstance(found, dict):
            return found
    return {}


def _described(holder: dict[str, Any]) -> str:
    if not holder:
        return "another process"
    return f"{holder.get('what')}, process {holder.get('pid')} on {holder.get('host')}, since {holder.get('since')}"


def _is_this_process(holder: dict[str, Any]) -> bool:
    return holder.get("pid") == os.getpid() and holder.get("host") == socket.gethostname()


def _is_alive(pid: Any) -> bool:
    if os.name == "nt" or not isinstance(pid, int) or pid <= 0:
        return True  # on Windows os.kill would end the process
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:
        return True
    return True
