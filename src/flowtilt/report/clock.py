"""The run's clock: what all its curves have as their x axis."""

import math
from dataclasses import dataclass

import numpy as np

from flowtilt.report.axes import Axis, nice_step, round_ticks
from flowtilt.report.loading import Run
from flowtilt.report.numbers import Array, number


@dataclass(frozen=True)
class Clock:
    """The x axis of every curve: training time in `unit`, or steps where no time was logged."""

    steps: Array  # [N], rising
    times: Array  # [N], in `unit`
    unit: str
    scale: float  # seconds in one unit, NaN where no time was logged

    @property
    def name(self) -> str:
        return {"s": "seconds of training", "min": "minutes of training", "h": "hours of training"}.get(self.unit, "training steps")

    def at(self, step: float) -> float:
        """The time of a step, straight between those known."""
        return float(np.interp(step, self.steps, self.times))

    def axis(self, count: int = 6) -> Axis:
        high = float(self.times.max()) or 1.0
        return Axis(0.0, high, round_ticks(0.0, high, max(nice_step(high, count), 1.0 if self.unit == "step" else 0.0)))

    def step_ticks(self, count: int = 6) -> tuple[tuple[float, str], ...]:
        """(time, label) of round steps, none where steps are the axis already."""
        last = float(self.steps.max())
        if self.unit == "step" or last < 1:
            return ()
        return tuple((self.at(step), label) for step, label in round_ticks(0.0, last, max(1.0, nice_step(last, count))))


def time_unit(longest: float) -> tuple[str, float]:
    """The unit in which so many seconds read well, and its seconds."""
    return ("s", 1.0) if longest < 300 else ("min", 60.0) if longest < 3 * 3600 else ("h", 3600.0)


def clock(run: Run) -> Clock:
    """The clock of a run, from all records that carry both a step and the seconds of training."""
    records = [(int(r["step"]), number(r, "seconds")) for r in (*run.evaluations, *run.metrics)]
    timed = {0: 0.0} | {step: seconds for step, seconds in sorted(records) if math.isfinite(seconds)}
    longest = max(timed.values())
    if longest <= 0:
        steps = np.array(sorted({0} | {step for step, _ in records}), dtype=float)
        return Clock(steps, steps, "step", math.nan)
    unit, scale = time_unit(longest)
    # whatever the files say, time does not run backwards
    times = np.maximum.accumulate(np.array(list(timed.values())) / scale)
    return Clock(np.array(list(timed), dtype=float), times, unit, scale)
