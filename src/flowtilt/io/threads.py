"""Work in threads that never outlive their use.

All are daemons: those of a pool of `concurrent.futures` keep an interrupted program alive until the last of
them is done, and one that waits for a server may wait for minutes.

But a daemon that computes while the interpreter ends aborts the process: it is stopped inside torch's C++. So
each has a lock, which it holds except while it is `waiting`. At the end of the program the locks are taken,
one by one: who computes finishes that first, who waits never comes back.
"""

import atexit
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from queue import Empty, SimpleQueue
from typing import Any, TypeVar

from flowtilt.errors import printable

T = TypeVar("T")

GRACE = 10.0
"""Seconds for which a program that ends waits for threads that compute."""
_locks: set[threading.Lock] = set()
_own = threading.local()


def start(work: Callable[[], None]) -> None:
    """Runs `work` in a daemon thread that the end of the program does not stop in the midst of a computation."""
    lock = threading.Lock()

    def locked() -> None:
        _own.lock = lock
        with lock:
            work()
        _locks.discard(lock)

    _locks.add(lock)
    threading.Thread(target=locked, daemon=True).start()


@contextmanager
def waiting() -> Iterator[None]:
    """Inside, nothing is computed: the thread may be left behind when the program ends."""
    lock: threading.Lock | None = getattr(_own, "lock", None)
    if lock is None:
        yield
        return
    lock.release()
    try:
        yield
    finally:
        lock.acquire()


@atexit.register
def _still() -> None:
    end = time.monotonic() + GRACE
    taken: set[threading.Lock] = set()
    while left := _locks - taken:  # one that computes may start others
        lock = left.pop()
        lock.acquire(timeout=max(0.0, end - time.monotonic()))
        taken.add(lock)


def name_those_left(seconds: float = 5.0) -> None:
    """Says, if the program has not ended after some seconds, which threads it waits for: a reward may have started them."""

    def say() -> None:
        left = [one.name for one in threading.enumerate() if not one.daemon and one is not threading.main_thread()]
        if left:
            text = f"waiting for {', '.join(left)}, started by a reward or a library; Ctrl-C ends it"
            print(f"flowtilt: all is done and saved; {printable(text)}", file=sys.stderr, flush=True)

    timer = threading.Timer(seconds, say)
    timer.daemon = True
    timer.start()


def in_threads(tasks: Sequence[Callable[[], T]], workers: int) -> list[T]:
    """Results in the tasks' order, at most `workers` at a time; the first error ends it at once."""
    todo: SimpleQueue[tuple[int, Callable[[], T]]] = SimpleQueue()
    done: SimpleQueue[tuple[int, T | BaseException]] = SimpleQueue()
    for numbered in enumerate(tasks):
        todo.put(numbered)
    stopped = threading.Event()

    def work() -> None:
        while not stopped.is_set():
            try:
                i, task = todo.get_nowait()
            except Empty:
                return
            try:
                done.put((i, task()))
            except BaseException as error:
                done.put((i, error))

    for _ in range(min(workers, len(tasks))):
        start(work)
    results: dict[int, T] = {}
    try:
        while len(results) < len(tasks):
            with waiting():
                i, result = done.get()
            if isinstance(result, BaseException):
                raise result
            results[i] = result
    finally:
        stopped.set()
    return [results[i] for i in range(len(tasks))]


class Turns:
    """A lock that threads get in the order in which they ask, so that one with much to do keeps none waiting; who has it may ask again."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._queue: list[int] = []
        self._depth = 0

    def __enter__(self) -> None:
        own = threading.get_ident()
        with waiting(), self._changed:
            if own not in self._queue:
                self._queue.append(own)
                try:
                    self._changed.wait_for(lambda: self._queue[0] == own)
                except BaseException:  # interrupted while it waited
                    self._queue.remove(own)
                    self._changed.notify_all()
                    raise
            self._depth += 1

    def __exit__(self, *_: object) -> None:
        with self._changed:
            self._depth -= 1
            if not self._depth:
                del self._queue[0]
                self._changed.notify_all()


class Background:
    """One thread that does what it is given, in that order."""

    def __init__(self) -> None:
        self._todo: SimpleQueue[tuple[Future[Any], Callable[[], Any]] | None] = SimpleQueue()
        self._closed = threading.Event()
        start(self._work)

    def submit(self, task: Callable[[], T]) -> Future[T]:
        """The task's result, in time."""
        future: Future[T] = Future()
        self._todo.put((future, task))
        return future

    def close(self) -> None:
        """Begins nothing more, and waits for nothing."""
        self._closed.set()
        self._todo.put(None)

    def _work(self) -> None:
        while (given := self._next()) and not self._closed.is_set():
            future, task = given
            try:
                future.set_result(task())
            except BaseException as error:
                future.set_exception(error)

    def _next(self) -> tuple[Future[Any], Callable[[], Any]] | None:
        with waiting():
            return self._todo.get()
