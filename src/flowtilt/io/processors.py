"""How much of this machine's processors other programs use."""

import os
import time

import psutil


class Others:
    """Watches the processors that this process may use, from here on."""

    def __init__(self) -> None:
        busy = _busy_seconds()
        self._processors = len(busy)
        self._began, self._busy, self._own = time.monotonic(), sum(busy), _own_seconds()

    def free(self) -> tuple[float, int]:
        """Processors that other programs left free since this was made, on average, and how many there are."""
        seconds = time.monotonic() - self._began
        others = (sum(_busy_seconds()) - self._busy - (_own_seconds() - self._own)) / max(seconds, 1e-9)
        return min(max(self._processors - others, 0.0), float(self._processors)), self._processors


def _busy_seconds() -> list[float]:
    """Of each processor that this process may use, since the machine started."""
    times = psutil.cpu_times(percpu=True)
    allowed = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else range(len(times))
    return [sum(t) - t.idle - getattr(t, "iowait", 0.0) - getattr(t, "guest", 0.0) for k, t in enumerate(times) if k in allowed]


def _own_seconds() -> float:
    """That this process and its children, the ended ones too, have computed."""
    process, total = psutil.Process(), 0.0
    for one in (process, *process.children(recursive=True)):
        try:
            total += sum(one.cpu_times()[:2])
        except psutil.Error:  # ended meanwhile
            continue
    return total + sum(process.cpu_times()[2:4])
