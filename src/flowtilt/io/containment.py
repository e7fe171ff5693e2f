"""Code that users bring runs inside this process: it leaves the process as it found it, and what it prints is no result."""

import gc
import locale
import logging
import os
import random
import signal
import sys
import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from typing import Any, NamedTuple

import numpy as np
import torch

from flowtilt.distributed import signals
from flowtilt.errors import UserError

log = logging.getLogger("flowtilt")
SLOW = 60.0
"""Seconds of a call after which a line says what is waited for; then after twice as long, and so on."""
RANKS = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "CUDA_VISIBLE_DEVICES")
"""Environment variables that say where this process computes and with whom."""

_thread = threading.local()
_reported: set[tuple[str, str]] = set()


class Part(NamedTuple):
    """One part of a process's state.

    Args:
        name: for the line that says it was put back; "" where nobody needs to know.
    """

    read: Callable[[], Any]
    write: Callable[[Any], object]
    name: str = ""


@contextmanager
def contained(what: str, *, seed: int | None = None, path: Sequence[str] = (), slow: str = "") -> Iterator[None]:
    """Runs a block of the user's code; afterwards the state of the process is as before, whatever the block did and however it ended.

    Put back are the working directory, torch's and numpy's settings, the global random generators, signal handlers, timers,
    warnings, logging, locale, sys.path, hooks and streams. Inside, standard output is standard error. Of blocks inside each
    other the outermost one restores.

    Args:
        what: whose code it is, for messages.
        seed: of the global random generators inside; none leaves them as they are.
        path: folders where imports look, too, after all others.
        slow: what is waited for when the block takes long; "" says nothing.

    Raises:
        UserError: something was changed that can't be put back.
    """
    if getattr(_thread, "inside", False):
        _extend(path)
        yield
        return
    main = threading.current_thread() is threading.main_thread()
    parts = [*PARTS, *(MAIN_PARTS if main else ())]
    before = [part.read() for part in parts]
    inference = torch.is_inference_mode_enabled()
    generators = _generators()
    if seed is not None:
        _seed(seed)
    _thread.inside = True
    try:
        with ExitStack() as stack:
            stack.enter_context(_STDOUT.aside())
            if slow:
                stack.enter_context(_watched(slow))
            _extend(path)
            yield
    finally:
        _thread.inside = False
        changed = _put_back(parts, before)
        if main and (pair := signals.current().pair):  # an event loop of theirs may have taken it
            signal.set_wakeup_fd(pair[1].fileno(), warn_on_full_buffer=False)
        _restore(generators)
        for name in changed:
            _report_once(what, name)
        if torch.is_inference_mode_enabled() != inference:
            raise UserError(f'{what}: leaves torch.inference_mode switched; write "with torch.inference_mode():" around what needs it')


def _extend(path: Sequence[str]) -> None:
    sys.path += [folder for folder in path if folder not in sys.path]


def _put_back(parts: Sequence[Part], before: Sequence[Any]) -> list[str]:
    """Restores what has changed; returns the names of it."""
    changed = []
    for part, value in zip(parts, before, strict=True):
        if part.read() != value:
            part.write(value)
            changed.append(part.name)
    return [name for name in changed if name]


def _report_once(what: str, name: str) -> None:
    if (what, name) not in _reported:
        _reported.add((what, name))
        log.warning("%s: changes %s; flowtilt put it back", what, name)


@contextmanager
def _watched(what: str) -> Iterator[None]:
    done = threading.Event()

    def wait() -> None:
        seconds, passed = SLOW, 0.0
        while not done.wait(seconds):
            passed += seconds
            log.warning("still waiting for %s after %.0f s", what, passed)
            seconds = passed

    threading.Thread(target=wait, name="slow", daemon=True).start()
    try:
        yield
    finally:
        done.set()


# random generators ------------------------------------------------------------------------------------------


def _generators() -> list[Any]:
    devices = [one.get_state() for one in torch.cuda.default_generators] if torch.cuda.is_initialized() else []
    return [random.getstate(), np.random.get_state(), torch.default_generator.get_state(), devices]


def _restore(states: list[Any]) -> None:
    random.setstate(states[0])
    np.random.set_state(states[1])
    torch.default_generator.set_state(states[2])
    for one, state in zip(torch.cuda.default_generators, states[3], strict=False):
        one.set_state(state)


def _seed(seed: int) -> None:
    random.seed(seed)
    np.random.seed(seed % 2**32)
    for one in (torch.default_generator, *(torch.cuda.default_generators if torch.cuda.is_initialized() else ())):
        one.manual_seed(seed)


# standard output --------------------------------------------------------------------------------------------


class _Stdout:
    """Stands in for sys.stdout while the user's code runs: theirs goes to stderr, and that of the main thread outside of it to stdout."""

    def __init__(self) -> None:
        self._lock, self._users, self._own = threading.Lock(), 0, None

    @contextmanager
    def aside(self) -> Iterator[None]:
        with self._lock:
            if not self._users:
                self._own = sys.stdout
            self._users += 1
            sys.stdout = self
        errors, keys = sys.stderr, sys.stdin
        try:
            yield
        finally:
            sys.stderr, sys.stdin = errors, keys
            with self._lock:
                self._users -= 1
                sys.stdout = self if self._users else self._own

    def __getattr__(self, name: str) -> Any:
        theirs = getattr(_thread, "inside", False) or threading.current_thread() is not threading.main_thread()
        return getattr(sys.stderr if theirs else self._own, name)

    def close(self) -> None:
        """Does nothing: whose it is goes on writing."""


_STDOUT = _Stdout()


# parts of the state -----------------------------------------------------------------------------------------


def _folder() -> str | None:
    with suppress(OSError):
        return os.getcwd()
    return None


def _change_folder(folder: str | None) -> None:
    try:
        if folder is not None:
            os.chdir(folder)
    except OSError as error:
        raise UserError(f"the working directory {folder} is gone: {error.strerror}") from error


def _set_default_device(device: torch.device) -> None:
    torch.set_default_device(None if device.type == "cpu" else device)


def _environment() -> dict[str, str | None]:
    return {name: os.environ.get(name) for name in RANKS}


def _set_environment(values: dict[str, str | None]) -> None:
    for name, value in values.items():
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value


_SMALLEST = 5e-324


def _flushes_denormals() -> bool:
    return float(np.float64(_SMALLEST) * np.float64(1.0)) == 0.0


def _cudnn() -> tuple[bool, ...]:
    found = torch.backends.cudnn
    return found.enabled, found.benchmark, found.deterministic


def _set_cudnn(values: tuple[bool, ...]) -> None:
    torch.backends.cudnn.enabled, torch.backends.cudnn.benchmark, torch.backends.cudnn.deterministic = values


def _warnings() -> tuple[Any, ...]:
    return warnings.filters, list(warnings.filters), warnings.showwarning


def _set_warnings(values: tuple[Any, ...]) -> None:
    warnings.filters, filters, warnings.showwarning = values
    warnings.resetwarnings()  # which also forgets what was said already
    warnings.filters.extend(filters)


def _logging() -> tuple[Any, ...]:
    root = logging.root
    own = [(one, one.level, one.disabled, one.propagate, list(one.handlers)) for one in (root, log)]
    return own, root.manager.disable, logging.raiseExceptions


def _set_logging(values: tuple[Any, ...]) -> None:
    own, logging.root.manager.disable, logging.raiseExceptions = values
    for one, level, one.disabled, one.propagate, handlers in own:
        one.setLevel(level)
        one.handlers[:] = handlers


def _hooks() -> tuple[Any, ...]:
    return sys.excepthook, sys.unraisablehook, sys.displayhook, threading.excepthook, list(sys.argv), sys.getrecursionlimit()


def _set_hooks(values: tuple[Any, ...]) -> None:
    sys.excepthook, sys.unraisablehook, sys.displayhook, threading.excepthook, sys.argv, limit = values
    sys.setrecursionlimit(limit)


def _path() -> tuple[list[str], list[str]]:
    return sys.path, list(sys.path)


def _set_path(values: tuple[list[str], list[str]]) -> None:
    sys.path, sys.path[:] = values


def _set_collecting(on: bool) -> None:
    gc.enable() if on else gc.disable()


_NAMES = ("SIGINT", "SIGTERM", "SIGBREAK", "SIGHUP", "SIGQUIT", "SIGUSR1", "SIGUSR2", "SIGALRM", "SIGPIPE", "SIGCHLD", "SIGABRT")
_SIGNALS = [getattr(signal, name) for name in _NAMES if hasattr(signal, name)]


def _handlers() -> list[Any]:
    return [signal.getsignal(number) for number in _SIGNALS]


def _set_handlers(handlers: list[Any]) -> None:
    for number, handler in zip(_SIGNALS, handlers, strict=True):
        if handler is not None and signal.getsignal(number) != handler:
            signal.signal(number, handler)


PARTS = [
    Part(_folder, _change_folder, "the working directory"),
    Part(torch.get_default_dtype, torch.set_default_dtype, "torch's default dtype"),
    Part(torch.get_default_device, _set_default_device, "torch's default device"),
    Part(_environment, _set_environment, f"the environment ({', '.join(RANKS[:2])}, … {RANKS[-1]})"),
    Part(torch.is_grad_enabled, torch.set_grad_enabled),
    Part(torch.get_num_threads, torch.set_num_threads),
    Part(
        lambda: (torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()),
        lambda value: torch.use_deterministic_algorithms(value[0], warn_only=value[1]),
    ),
    Part(torch.get_float32_matmul_precision, torch.set_float32_matmul_precision),
    Part(_cudnn, _set_cudnn),
    Part(
        lambda: (torch.is_anomaly_enabled(), torch.is_anomaly_check_nan_enabled()),
        lambda value: torch.set_anomaly_enabled(*value),
    ),
    Part(_flushes_denormals, torch.set_flush_denormal),
    *(
        Part(lambda kind=kind: torch.is_autocast_enabled(kind), lambda on, kind=kind: torch.set_autocast_enabled(kind, on))
        for kind in ("cpu", "cuda")
    ),
    Part(np.geterr, lambda value: np.seterr(**value)),
    Part(_warnings, _set_warnings),
    Part(_logging, _set_logging),
    Part(lambda: locale.setlocale(locale.LC_ALL), lambda value: locale.setlocale(locale.LC_ALL, value)),
    Part(_hooks, _set_hooks),
    Part(_path, _set_path),
    Part(gc.isenabled, _set_collecting),
]
MAIN_PARTS = [Part(_handlers, _set_handlers)]
"""Those that only the main thread can change."""
if hasattr(signal, "setitimer"):
    MAIN_PARTS += [
        Part(lambda: signal.getitimer(signal.ITIMER_REAL)[0] > 0, lambda on: on or signal.setitimer(signal.ITIMER_REAL, 0)),
        Part(
            lambda: signal.pthread_sigmask(signal.SIG_BLOCK, ()),
            lambda value: signal.pthread_sigmask(signal.SIG_SETMASK, value),
        ),
    ]
