"""What guards remember of a run's metrics: how it began, means over blocks of rollouts, and the best that there was."""

from collections.abc import Mapping
from math import isfinite, sqrt
from statistics import fmean, pvariance
from typing import Any, NamedTuple

TRAINED = "trained"
"""The name under which the trained reward is remembered."""
START = 3
"""Rollouts whose mean is a metric's value at the start: the policy has hardly moved there."""
BLOCK = 10
"""Rollouts of a block. Each has other prompts, so single ones say little of a trend."""
EFFECT = 0.25
"""A reward has fallen once its mean is this many standard deviations of its images' scores below its best. By the table in
DiffusionNFT's paper (second-hand) models count as good that lost .005 of HPSv2.1 or ClipScore, far less than this."""
ERRORS = 4
"""... and this many standard errors, so that the noise of few images is no fall: among a hundred blocks one is three from the mean."""


class Fall(NamedTuple):
    """A mean that lies below its best, and the trained reward at both times; none before the first rollout."""

    best: float
    now: float
    trained_then: float | None
    trained_now: float | None


class History:
    """One run's past; `state` is JSON and goes into checkpoints, the same on every rank."""

    def __init__(self, state: Mapping[str, Any] | None = None):
        found = state or {}
        self.rollouts: int = found.get("rollouts", 0)
        self._start: dict[str, list[float]] = {name: list(values) for name, values in found.get("start", {}).items()}
        self._block: dict[str, list[float]] = {name: list(values) for name, values in found.get("block", {}).items()}
        self._before: dict[str, float] = dict(found.get("before", {}))
        self._best: dict[str, tuple[float | None, float | None]] = {name: tuple(pair) for name, pair in found.get("best", {}).items()}

    @property
    def state(self) -> dict[str, Any]:
        """Everything, as JSON."""
        return {
            "rollouts": self.rollouts,
            "start": self._start,
            "block": self._block,
            "before": self._before,
            "best": self._best,
        }

    def add(self, values: Mapping[str, float]) -> None:
        """One rollout's metrics that are to be remembered; NaN is no value."""
        if self.block_ends:
            self._before = {name: fmean(block) for name, block in self._block.items()}
            for name, mean in self._before.items():
                self.better(name, mean)
            self._block = {}
        self.rollouts += 1
        for name, value in values.items():
            if isfinite(value):
                self._block.setdefault(name, []).append(value)
                if self.rollouts <= START:
                    self._start.setdefault(name, []).append(value)

    @property
    def block_ends(self) -> bool:
        """Whether the newest rollout is its block's last."""
        return self.rollouts > 0 and self.rollouts % BLOCK == 0

    def start(self, name: str) -> float | None:
        """Mean over the first rollouts; none while those go on, or without a value."""
        values = self._start.get(name)
        return fmean(values) if values and self.rollouts > START else None

    def mean(self, name: str) -> float | None:
        """Mean over the rollouts of the block that goes on, or of the one before where there are none yet."""
        block = self._block.get(name)
        return fmean(block) if block else self._before.get(name)

    def growth(self, name: str) -> float | None:
        """How many times the mean of the block before the mean of this one is, when it ends, from the third block on."""
        before, now = self._before.get(name), self.mean(name)
        if not self.block_ends or self.rollouts < 3 * BLOCK or not before or now is None:
            return None
        return now / before

    def error(self, name: str) -> float:
        """Standard error of the block's mean, from the spread of its rollouts."""
        block = self._block.get(name, [])
        return sqrt(pvariance(block) / (len(block) - 1)) if len(block) > 1 else float("inf")

    def fall(self, name: str, now: float, std: float, error: float) -> Fall | None:
        """How far `now` lies below the best of this name, or none where there is no best, or it is not below by more than noise.

        Args:
            std: standard deviation of the scores that `now` is the mean of.
            error: standard error of `now`.
        """
        best, then = self._best.get(name, (None, None))
        if best is None or best - now <= max(EFFECT * std, ERRORS * sqrt(2) * error):
            return None
        return Fall(best, now, then, self.mean(TRAINED))

    def better(self, name: str, value: float) -> None:
        """Remembers a mean, with the trained reward of the time, if it is the best so far."""
        best = self._best.get(name, (None, None))[0]
        if best is None or value > best:
            self._best[name] = (value, self.mean(TRAINED))
