"""Whether a run has become far slower than it was."""

from collections import deque
from collections.abc import Mapping
from statistics import median

BEFORE = 5
"""Rollouts from which on a run's own pace is known."""
LAST = 3
"""Rollouts in a row that must be slow: one may wait for a disk."""
SLOW = 1 / 3
"""Share of the usual pace below which a rollout is slow. Another busy process alone leaves half and more."""
WINDOW = 1000
"""Newest rollouts that are remembered."""


class Pace:
    """A run's images per second; speaks once."""

    def __init__(self) -> None:
        self._usual: deque[float] = deque(maxlen=WINDOW)
        self._slow = 0
        self._spoke = False

    def remark(self, metrics: Mapping[str, float]) -> str | None:
        """After each rollout: what happened and what to do, where the last few were far slower than usual."""
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
