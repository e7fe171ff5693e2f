"""Processes that share one run, forked from one that has imported everything: what torchrun starts, without its seconds."""

import contextlib
import faulthandler
import multiprocessing
import os
import socket
import sys
import time
from dataclasses import dataclass
from multiprocessing import forkserver, resource_tracker, util

import pytest
import torch

from flowtilt.models.opening import load_pipeline

_CONTEXT = multiprocessing.get_context("forkserver")


def fork_from_here():
    """What others are forked from is this process as it is now, where the library's would import everything anew."""
    load_pipeline("playground", revision=None, dtype="float32", device=torch.device("cpu"))  # is then read for all
    resource_tracker.ensure_running()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(util, "spawnv_passfds", _fork)
        forkserver.ensure_running()


def _fork(executable, words, kept):
    if process := os.fork():
        return process
    try:
        faulthandler.disable()
        sys.stdout, sys.stderr = (os.fdopen(file, "w", buffering=1, closefd=False) for file in (1, 2))
        for file in {int(name) for name in os.listdir("/dev/fd")} - {0, 1, 2, *kept}:
            with contextlib.suppress(OSError):
                os.close(file)
        exec(words[-1])
    finally:
        os._exit(0)


def forked(function, *args):
    """A process at `function(*args)`."""
    process = _CONTEXT.Process(target=function, args=args)
    process.start()
    return process


@dataclass
class Done:
    """How the ranks ended: their exit statuses, and what each wrote to stderr."""

    codes: list[int | None]
    errors: list[str]

    @property
    def stderr(self):
        return "\n".join(self.errors)


def _rank(environment, place, function, args):
    os.environ.update(environment)
    file = os.open(place, os.O_WRONLY | os.O_CREAT)
    os.dup2(file, 2)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    torch.set_num_threads(1)
    sys.exit(function(*args))


def start(size, function, *args, folder, **environment):
    """`size` processes at `function(*args)`, whose result is the exit status."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        shared = {"WORLD_SIZE": str(size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1]), **environment}
    folder.mkdir(exist_ok=True)
    processes = []
    for rank in range(size):
        own = {"RANK": str(rank), "LOCAL_RANK": str(rank), **shared}
        processes.append(forked(_rank, own, str(folder / f"stderr-{rank}"), function, args))
    return processes


def together(size, function, *args, folder, within=240.0, **environment):
    """The same, waited for."""
    return ended(start(size, function, *args, folder=folder, **environment), folder, within)


def ended(processes, folder, within):
    """How they ended; what is still there after so many seconds is killed and has the status None."""
    end = time.monotonic() + within
    for process in processes:
        process.join(max(0.0, end - time.monotonic()))
    codes = [process.exitcode for process in processes]
    for process in processes:
        process.kill()
        process.join()
    return Done(codes, [(folder / f"stderr-{rank}").read_text(errors="replace") for rank in range(len(processes))])
