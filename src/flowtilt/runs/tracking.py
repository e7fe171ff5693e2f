"""Sends a run's figures to trackers, beside the run's own files; `sinks` has what each of them is sent.

A tracker never costs a run: its first error becomes a warning, and the run goes on without it.
"""

import importlib
import importlib.util
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from flowtilt.config import Recipe
from flowtilt.errors import UserError
from flowtilt.evaluate import Evaluation
from flowtilt.io.images import to_pil
from flowtilt.io.user_errors import first_line
from flowtilt.runs.sinks import Hosted, MLflow, Picture, Sink, TensorBoard, Value, may_log_in

TRACKERS = ("wandb", "tensorboard", "trackio", "mlflow")


class Trackers:
    """All trackers of a run. One that fails costs one warning and is left out from then on.

    Args:
        sinks: functions that open them, by name.
        warn: takes a line for a person.
    """

    def __init__(self, sinks: Mapping[str, Callable[[], Sink]] | None = None, warn: Callable[[str], None] = print):
        self._warn, self._finished = warn, False
        self._sinks: dict[str, Sink] = {}
        for name, opening in (sinks or {}).items():
            with self._guarded(name):
                self._sinks[name] = opening()

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Metrics of a rollout."""
        self._send("metrics", step, metrics)

    def evaluation(self, step: int, found: Evaluation) -> None:
        """Scores and samples of an evaluation after `step` rollouts."""
        values = {
            "evaluation/score": found.score,
            **{f"evaluation/reward/{name}": value for name, value in found.rewards.items()},
            **{f"evaluation/tag/{tag}": value for tag, value in found.by_tag.items()},
            **{f"evaluation/missing/{name}": float(count) for name, count in found.missing.items()},
        }
        self._send("evaluation", step, values)
        self.images(step, {f"samples/{k:02d}": p for k, p in enumerate(_pictures(found))})

    def images(self, step: int, pictures: Mapping[str, Picture]) -> None:
        """Images of a step by name."""
        if pictures:
            self._send("images", step, pictures)

    def guards(self, step: int, fired: Mapping[str, str]) -> None:
        """Guards that fired, with their messages."""
        for name, message in fired.items():
            self._send(f"guard/{name}", step, {f"guard/{name}": message})

    def summary(self, step: int, summary: Mapping[str, Any]) -> None:
        """The numbers of a finished run."""
        self._finished = True
        flat = {f"summary/{key}/{part}": v for key, value in summary.items() if isinstance(value, dict) for part, v in value.items()}
        flat |= {f"summary/{key}": value for key, value in summary.items()}
        self._send("summary", step, {key: float(value) for key, value in flat.items() if isinstance(value, int | float)})

    def close(self) -> None:
        """Ends them all."""
        for name, sink in list(self._sinks.items()):
            with self._guarded(name):
                sink.close(self._finished)
        self._sinks = {}

    def _send(self, kind: str, step: int, values: Mapping[str, Value]) -> None:
        for name, sink in list(self._sinks.items()):
            with self._guarded(name):
                sink.send(kind, step, values)

    @contextmanager
    def _guarded(self, name: str) -> Iterator[None]:
        try:
            yield
        except (Exception, SystemExit) as error:  # wandb ends the program where it can't ask
            self._sinks.pop(name, None)
            self._warn(f"track: {name} failed, so the run goes on without it: {type(error).__name__}: {first_line(error)}")


def check(names: Sequence[str], quiet: bool = False) -> None:
    """Looks before a run begins at whether its trackers are installed, and logged in.

    Args:
        quiet: print nothing.

    Raises:
        UserError: one is not installed; names the extra.
    """
    for name in names:
        if importlib.util.find_spec(name) is None:
            raise UserError(f"track: {name} is not installed; pip install {name}")
    if "wandb" in names and not quiet:
        try:
            if not may_log_in(importlib.import_module("wandb")):
                print("track: wandb has no login, so it logs offline; `wandb login` before a run, `wandb sync` after it", file=sys.stderr)
        except (Exception, SystemExit):
            pass  # what is wrong with it is said when the run opens it


def open_trackers(recipe: Recipe, run: Path, step: int, warn: Callable[[str], None]) -> Trackers:
    """The trackers that a recipe asks for, of a run after `step` rollouts."""

    def opening(name: str) -> Callable[[], Sink]:
        if name == "tensorboard":
            return lambda: TensorBoard(run, recipe, step)
        if name == "mlflow":
            return lambda: MLflow(run, recipe)
        return lambda: Hosted(name, importlib.import_module(name), run, recipe)

    return Trackers({name: opening(name) for name in recipe.track}, warn)


def _pictures(found: Evaluation) -> list[Picture]:
    """An evaluation's samples, each with its caption and score."""
    rows = [str(row["prompt"]) + ("" if row["score"] is None else f" ({row['score']})") for row in found.sample_rows]
    return [Picture(image, text) for image, text in zip(to_pil(found.samples) if rows else [], rows, strict=True)]
