"""What guards remember of a run's metrics: how it began, means over blocks of rollouts, and the best that there was."""

from collections.abc import Mapping
from math import hypot, isfinite, sqrt
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
ERRORS = 3
"""... and this many standard errors, so that the noise of few images is no fall."""


class Mean(NamedTuple):
    """A reward's mean over images.

    Args:
        value: the mean.
        std: standard deviation of the images' scores.
        error: standard error of the mean.
        trained: the trained reward at the same time; none before the first rollout.
    """

    value: float
    std: float
    error: float
    trained: float | None


class Fall(NamedTuple):
    """A mean that lies below its best by more than noise."""

    best: Mean
    now: Mean


class History:
    """One run's past; `state` is JSON and goes into checkpoints, the same on every rank."""

    def __init__(self, state: Mapping[str, Any] | None = None):
        found = state or {}
        self.rollouts: int = found.get("rollouts", 0)
        self._start: dict[str, list[float]] = {name: list(values) for name, values in found.get("start", {}).items()}
        self._block: dict[str, list[float]] = {name: list(values) for name, values in found.get("block", {}).items()}
        self._before: dict[str, float] = dict(found.get("before", {}))
        self._best = {name: Mean(*values) for name, values in found.get("best", {}).items()}

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
            for name in self._block:
                if reward := self.reward(name):
                    self.better(name, reward)
            self._before = {name: fmean(block) for name, block in self._block.items()}
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

    def reward(self, name: str) -> Mean | None:
        """A reward over the block that goes on, its error from the spread of the rollouts; none without its `<name>_std`."""
        values, stds = self._block.get(name, []), self._block.get(f"{name}_std")
        if len(values) < 2 or not stds:
            return None
        return Mean(fmean(values), fmean(stds), sqrt(pvariance(values) / (len(values) - 1)), self.mean(TRAINED))

    def judged(self, value: float, std: float, images: int) -> Mean:
        """A reward's mean over an evaluation's images."""
        return Mean(value, std, std / sqrt(images), self.mean(TRAINED))

    def better(self, name: str, now: Mean) -> None:
        """Remembers a mean if it is the best so far."""
        if name not in self._best or now.value > self._best[name].value:
            self._best[name] = now

    def fall(self, name: str, now: Mean) -> Fall | None:
        """How a mean lies below the best of this name; none where there is no best, or no more than noise between."""
        best = self._best.get(name)
        if best is None:
            return None
        noise = ERRORS * hypot(best.error, now.error)
        return Fall(best, now) if best.value - now.value > max(EFFECT * max(best.std, now.std), noise) else None

    def trained_rose(self, fall: Fall) -> bool:
        """Whether the trained reward is higher than it was at the best; before the first rollout it was what the first ones have."""
        first = self._start.get(TRAINED)
        then = fmean(first) if fall.best.trained is None and first else fall.best.trained
        return then is not None and fall.now.trained is not None and fall.now.trained > then
