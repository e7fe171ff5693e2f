"""What training costs, on four axes: network evaluations, seconds, rollouts, optimizer steps."""

from dataclasses import dataclass

import numpy as np

from flowtilt.report.axes import Axis, nice_step, round_ticks
from flowtilt.report.clock import count_unit, time_unit
from flowtilt.report.loading import Run
from flowtilt.report.numbers import Array, number, short


@dataclass(frozen=True)
class Cost:
    """One axis: the key of metrics.jsonl that counts it since the start of a run, its name, what stands behind a number of it."""

    key: str
    name: str
    behind: str
    counted: str


COSTS = {
    "evaluations": Cost(
        "network_evaluations",
        "network evaluations",
        "network evaluations",
        "One image through the network once counts one, a backward pass two more; evaluations of the score are not counted.",
    ),
    "seconds": Cost("seconds", "seconds of training", "of training", "Training alone, without evaluations, checkpoints and loading."),
    "rollouts": Cost("rollout", "rollouts", "rollouts", "Rollouts, however many images each of them has."),
    "optimizer-steps": Cost(
        "optimizer_step",
        "optimizer steps",
        "optimizer steps",
        "Steps of AdamW, however many images each of them sees.",
    ),
}


@dataclass(frozen=True)
class Unit:
    """What an axis is written in: `factor` of the cost's own unit; `sign` stands behind numbers."""

    sign: str
    factor: float
    name: str

    def axis(self, high: float) -> Axis:
        """From 0 to `high`, both in the cost's own unit."""
        top = high / self.factor or 1.0
        step = nice_step(top, 8)
        return Axis(0.0, top, round_ticks(0.0, top, step if self.sign else max(step, 1.0)))

    def written(self, cost: float) -> str:
        """413 k, behind which the name of the cost can stand; 12 min."""
        return f"{short(cost / self.factor)} {self.sign}".rstrip()


def unit_of(cost: str, high: float) -> Unit:
    """The unit in which costs up to `high` read well."""
    name = COSTS[cost].name
    if cost == "seconds":
        sign, factor = time_unit(high)
        return Unit(sign, factor, {"s": "seconds", "min": "minutes", "h": "hours"}[sign] + " of training")
    if cost == "evaluations":
        sign, factor, word = count_unit(high)
        return Unit(sign, factor, f"{word} {name}".strip())
    return Unit("", 1.0, name)


def spent(run: Run, cost: str, steps: Array) -> Array:
    """What a run had spent by these rollouts [N]: straight between those logged, NaN beyond the last, and never falling."""
    key = COSTS[cost].key
    logged = [(int(record["rollout"]), number(record, key)) for record in (*run.metrics, *run.evaluations)]
    known = {0: 0.0} | {step: value for step, value in sorted(logged) if np.isfinite(value)}
    values = np.maximum.accumulate(np.array(list(known.values())))
    return np.interp(steps, np.array(list(known), dtype=float), values, right=np.nan)
