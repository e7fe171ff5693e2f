"""How signals end a command. INT, TERM, HUP and USR1 mean the same, whichever process gets them, and however often.

A command ends at once, by a KeyboardInterrupt. Work that is not saved yet (`Ending.protect`) is told instead, saves, and ends
by itself; a second Ctrl-C ends that at once, too. Other signals may come twice, as a scheduler and torchrun both send them.

Python runs a signal's handler in the main thread, between two of its instructions: never while that waits inside C, for
another rank say. So a thread learns of every signal as well, and ends the process where the main thread doesn't.
"""

import os
import selectors
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from types import FrameType
from typing import Any, Protocol

from flowtilt.distributed import torchrun

NAMES = ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1")
NUMBERS = [number for name in NAMES if (number := getattr(signal, name, None)) is not None]
"""Windows has the first two alone."""
SECOND_INTERRUPT_SECONDS = 1.0
"""Seconds from which on a second SIGINT is a person's. One that torchrun or a terminal sends twice comes sooner."""
FORCE = 5.0
"""Seconds that a process has to end by itself."""


class Work(Protocol):
    """What is going on: told to end by `interrupted`, and not to be ended at once while `unsaved`."""

    interrupted: bool
    unsaved: bool


class _Deferred:
    interrupted, unsaved = False, True


class Ending:
    """What signals do to this process."""

    def __init__(self, force: bool = True) -> None:
        self._may_force = force
        self.last_words: Callable[[], None] = lambda: None
        """Called before a process is ended by force."""
        self.status = 130
        """The exit status of what was interrupted."""
        self.pair: tuple[socket.socket, socket.socket] | None = None
        """Through which Python tells the thread of signals."""
        self._work: Work | None = None
        self._tell = False
        self._asked_at: float | None = None
        self._raised = self._over = False

    def protect(self, work: Work, tell: bool) -> None:
        """Signals tell `work`, which saves before it ends; `tell` says so to the user."""
        self._work, self._tell = work, tell

    @contextmanager
    def deferred(self) -> Iterator[Work]:
        """Inside, signals are only noted, in `interrupted`."""
        before, self._work = self._work, _Deferred()
        try:
            yield self._work
        finally:
            self._work, self._asked_at = before, None

    @contextmanager
    def whole(self) -> Iterator[None]:
        """Inside, an error that a library made of the KeyboardInterrupt is one again."""
        try:
            yield
        except Exception as error:
            if self._raised:
                raise KeyboardInterrupt from error
            raise

    def over(self) -> None:
        """The command has ended: signals change nothing any more, unless its exit hangs."""
        self._over = True

    def handle(self, number: int, frame: FrameType | None) -> None:
        """Python's handler."""
        if self._raised or self._over:
            return
        now = time.monotonic()
        if self._work:
            self._work.interrupted = True
            again = number == signal.SIGINT and self._asked_at is not None and now - self._asked_at > SECOND_INTERRUPT_SECONDS
            if self._work.unsaved and not again:
                if self._asked_at is None:
                    self._asked_at = now
                    if self._tell:
                        write(f"\nstopping after this rollout{'; Ctrl-C once more stops at once' if number == signal.SIGINT else ''}\n")
                return
        self._raised = True  # cleaning up is not interrupted
        raise KeyboardInterrupt

    def watch(self, signals: socket.socket) -> None:
        """Reads the numbers of signals until the other end is closed; ends the process where they don't."""
        first: float | None = None
        end: float | None = None
        parent = os.getppid() if torchrun.present() else None
        selector = selectors.DefaultSelector()
        selector.register(signals, selectors.EVENT_READ)
        while True:
            ready = selector.select(0.5 if end or parent else None)
            now = time.monotonic()
            numbers = signals.recv(64) if ready else b""
            if ready and not numbers:
                return
            ours = [number for number in numbers if signal.getsignal(number) == self.handle]
            if ours:
                first = now if first is None else first
                again = signal.SIGINT in ours and now - first > SECOND_INTERRUPT_SECONDS
                if not end and (again or not self._work or not self._work.unsaved):
                    end = now + FORCE
            if end and now > end and self._may_force:
                self._force()
            if parent and os.getppid() != parent:  # torchrun is gone, killed or by a signal that it doesn't pass on
                parent = None
                os.kill(os.getpid(), signal.SIGTERM)

    def _force(self) -> None:
        if not self._over:
            write("flowtilt: interrupted\n")
        self.last_words()
        os._exit(self.status)


def write(text: str) -> None:
    """To stderr, past Python's buffers: a signal may come while those are in use."""
    with suppress(OSError):
        os.write(2, text.encode())


_current: Ending | None = None


def current() -> Ending:
    """The one of this process; without effect where no command runs."""
    return _current or Ending()


@contextmanager
def handled(force: bool = True) -> Iterator[Ending]:
    """Inside, signals end the command as above; inside of another `handled`, or outside of the main thread, nothing changes.

    Args:
        force: whether a process that does not end by itself is ended; false for one that is not only ours, such as a notebook's.
    """
    if _current or threading.current_thread() is not threading.main_thread():
        yield current()
        return
    release = install(force)
    try:
        yield current()
    finally:
        release()


def install(force: bool = True) -> Callable[[], None]:
    """As `handled`, until the result is called."""
    global _current
    ending = _current = Ending(force)
    reader, writer = ending.pair = socket.socketpair()  # open for as long as signals come
    writer.setblocking(False)
    before: dict[int, Any] = {number: signal.getsignal(number) for number in NUMBERS}
    if before.get(getattr(signal, "SIGHUP", 0)) == signal.SIG_IGN:  # nohup
        del before[signal.SIGHUP]
    wakeup = signal.set_wakeup_fd(writer.fileno(), warn_on_full_buffer=False)
    for number in before:
        signal.signal(number, ending.handle)
    thread = threading.Thread(target=ending.watch, args=(reader,), daemon=True)
    thread.start()

    def release() -> None:
        global _current
        _current = None
        for number, handler in before.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(wakeup)
        writer.close()
        thread.join()
        reader.close()

    return release


def _leave_to_parent() -> None:
    """A process that a reward forks ends by signals as any other, and is no business of the parent's handlers."""
    global _current
    if _current:
        signal.set_wakeup_fd(-1)
        for number in NUMBERS:
            if signal.getsignal(number) == _current.handle:
                signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
        _current = None


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_leave_to_parent)
