"""How Ctrl-C and SIGTERM end a training run: it finishes its rollout, saves, and returns; the second time it ends at once."""

import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Protocol


class Run(Protocol):
    """What is told to stop."""

    interrupted: bool


@contextmanager
def finishing(run: Run, tell: bool) -> Iterator[None]:
    """Inside, a signal sets `run.interrupted`, the second one raises KeyboardInterrupt. Other threads get no signals.

    Args:
        tell: say so to the user.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def handle(number: int, frame: FrameType | None) -> None:
        if run.interrupted:
            raise KeyboardInterrupt
        run.interrupted = True
        if tell:
            print("\nstopping after this rollout; once more to stop at once", file=sys.stderr, flush=True)

    before = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
