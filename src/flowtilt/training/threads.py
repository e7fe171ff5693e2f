"""How many threads a run on a CPU computes with: as many as other programs leave free, and then the same to its end.

Threads that share a processor with another program wait for it after every small operation. Beside two busy programs on two cores
a rollout of two threads took 1.3 to 34 times its time on the idle machine, of one thread 1.5 to 3 times (benchmarks/busy.py). Another
number rounds differently, so a run that goes on keeps the number that it began with.
"""

import json
import os
from pathlib import Path

import torch

from flowtilt.io.processors import Others
from flowtilt.io.run_folder import RunFolder

CHOICES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS")
"""Variables by which the user has chosen."""


class Threads:
    """Watches the processors from here on, while the run is loaded."""

    def __init__(self) -> None:
        self._others, self._before = Others(), torch.get_num_threads()

    def choose(self, recorded: int | None) -> str | None:
        """Sets the number of threads unless the user has; returns what to say of it, if anything.

        Args:
            recorded: with how many the run has computed so far; none for a new one. More than this machine has don't count.
        """
        now, chosen = torch.get_num_threads(), any(os.environ.get(name) for name in CHOICES)
        free, processors = self._others.free()
        if recorded and recorded <= processors:
            if recorded == now:
                return None
            if chosen:
                return f"threads: {now}, by the environment; this run began with {recorded}, so its numbers go on by other roundings"
            torch.set_num_threads(recorded)
            return f"threads: {recorded}, as this run began; OMP_NUM_THREADS={now} changes that, and its results by rounding"
        if (wanted := fitting(free, now)) == now:
            return None
        leave = f"other programs leave about {free:.1f} of {processors} processors free"
        if chosen:
            return f"threads: {now}, by the environment; {leave}, and threads that share one are far slower: take {wanted}"
        torch.set_num_threads(wanted)
        return f"threads: {wanted}, since {leave}; OMP_NUM_THREADS={now} takes more, and results differ by rounding"

    def back(self) -> None:
        """What the process computed with before."""
        torch.set_num_threads(self._before)


def recorded_threads(run: Path) -> int | None:
    """With how many a run has computed so far; none where it does not say."""
    try:
        found = json.loads(RunFolder(run).environment.read_text(encoding="utf-8"))["threads"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return found if isinstance(found, int) and found > 0 else None


def fitting(free: float, threads: int) -> int:
    """Of so many threads those that free processors are there for, one at least; half a processor is free enough."""
    return min(threads, max(1, int(free + 0.5)))
