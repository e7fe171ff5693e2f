"""Work in threads that never outlive their use.

All are daemons: those of a pool of `concurrent.futures` keep an interrupted program alive until the last of
them is done, and one that waits for a server may wait for minutes.
"""

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from queue import Empty, SimpleQueue
from typing import Any, TypeVar

T = TypeVar("T")


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
        threading.Thread(target=work, daemon=True).start()
    results: dict[int, T] = {}
    try:
        while len(results) < len(tasks):
            i, result = done.get()
            if isinstance(result, BaseException):
                raise result
            results[i] = result
    finally:
        stopped.set()
    return [results[i] for i in range(len(tasks))]


class Background:
    """One thread that does what it is given, in that order."""

    def __init__(self) -> None:
        self._todo: SimpleQueue[tuple[Future[Any], Callable[[], Any]] | None] = SimpleQueue()
        self._closed = threading.Event()
        threading.Thread(target=self._work, daemon=True).start()

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
        while (given := self._todo.get()) and not self._closed.is_set():
            future, task = given
            try:
                future.set_result(task())
            except BaseException as error:
                future.set_exception(error)
