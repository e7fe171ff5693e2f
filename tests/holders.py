"""Another process that holds a folder, as a second training run or evaluation would."""

import contextlib
import os
import signal
import time
from pathlib import Path

from ranks import forked

from flowtilt.io.locks import HOLDER, Hold


def _hold(folder, what):
    hold = Hold(folder, what)
    (folder / "held").touch()
    time.sleep(300)
    hold.release()


@contextlib.contextmanager
def held_by(what: str, folder: Path):
    """Inside, another process holds the folder; it is killed in the end, as nothing else ends it."""
    process = forked(_hold, folder, what)
    end = time.monotonic() + 60
    while not (folder / "held").exists() and time.monotonic() < end:
        time.sleep(0.01)
    (folder / "held").unlink()
    assert (folder / HOLDER).exists()
    try:
        yield process.pid
    finally:
        os.kill(process.pid, signal.SIGKILL)
        process.join()
