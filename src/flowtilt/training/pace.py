"""Whether a run has become far slower than it was, or shares its processors."""

from collections import deque
from collections.abc import Mapping
from statistics import median

import torch

from flowtilt.io.processors import Others

BEFORE = 5
"""Rollouts from which on a run's own pace is known."""
LAST = 3
"""Rollouts in a row that must be slow: one may wait for a disk."""
SLOW = 1 / 3
"""Share of the usual pace below which a rollout is slow. Another busy process alone leaves half and more."""
WINDOW = 1000
"""Newest rollouts that are remembered."""


class Pace:
    """A run's images per second; speaks once of each.

    Args:
        others: has watched the processors since the run was prepared; none where the run does not compute on them alone.
    """

    def __init__(self, others: Others | None = None) -> None:
        self._others = others
        self._usual: deque[float] = deque(maxlen=WINDOW)
        self._slow = 0
        self._spoke = False

    def remark(self, metrics: Mapping[str, float]) -> str | None:
        """After each rollout: what happened and what to do, where processors are shared or the last few were far slower than usual."""
        others, self._others = self._others, None
        if others and (line := shared(*others.free(), threads=torch.get_num_threads())):
            return line
        now = metrics["images_per_second"]
        usual = median(self._usual) if len(self._usual) >= BEFORE else 0.0
        if now >= SLOW * usual:
            self._usual.append(now)
            self._slow = 0
            return None
        self._slow += 1
        if self._spoke or self._slow < LAST:
            return None
        self._spoke = True
        seconds = {name.removeprefix("time/"): value for name, value in metrics.items() if name.startswith("time/")}
        part = max(seconds, key=lambda name: seconds[name], default="")
        return (
            f"slow: {LAST} rollouts in a row made {now:.3g} images per second, this run's median is {usual:.3g}"
            + (f"; most of the time goes into {part!r}" if part else "")
            + ". Another program may use the same processors or GPU: stop it, or set OMP_NUM_THREADS to the number of free cores and "
            "go on with --resume (results depend on the number of threads, by rounding)"
        )


def shared(free: float, processors: int, threads: int) -> str | None:
    """What to do where other programs leave fewer processors free than training has threads, which wait for each other.

    Two busy programs on two cores made a rollout of two threads 1.3 to 34 times slower, of one thread 1.5 to 3 times (benchmarks/busy.py).
    """
    if threads < 2 or free > threads - 0.5:
        return None
    return (
        f"shared processors: other programs leave about {free:.1f} of {processors} free, and training has {threads} threads that wait for "
        f"each other. It may be twice as fast with OMP_NUM_THREADS={max(1, int(free))}: interrupt it, set that and go on with --resume "
        "(results depend on the number of threads, by rounding)"
    )
