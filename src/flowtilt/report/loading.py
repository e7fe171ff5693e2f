"""What a run's folder holds, read leniently: a missing, torn or odd file is a missing piece, never an error."""

import json
import tomllib
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from flowtilt.files import read_lines
from flowtilt.report.numbers import Array, number

Record = dict[str, Any]


@dataclass(frozen=True)
class Sample:
    """One kept image of an evaluation. `note` says why it is wrong and is empty where it is right."""

    path: Path
    prompt: str
    tag: str
    score: float  # NaN where there is none
    note: str


@dataclass(frozen=True)
class Run:
    """A run's records, each list by rising step; empty where the folder lacks the file."""

    folder: Path
    recipe_text: str
    recipe: Record
    environment: Record
    metrics: list[Record]
    evaluations: list[Record]
    samples: dict[int, list[Sample]]  # step -> the same prompts in the same order
    guards: list[Record]
    summary: Record

    @property
    def name(self) -> str:
        return str(self.summary.get("recipe") or self.recipe.get("name") or self.folder.resolve().name)

    @property
    def step(self) -> int:
        """The last step that was logged; 0 before the first."""
        return max((int(record["step"]) for record in (*self.metrics, *self.evaluations)), default=0)

    @property
    def finished(self) -> bool:
        """Whether the summary is about all that was logged: a run that was made longer leaves an older one behind."""
        return bool(self.summary) and not number(self.summary, "steps") < self.step

    @property
    def planned_steps(self) -> int | None:
        steps = self.recipe.get("steps")
        return steps if isinstance(steps, int) else None

    @property
    def seconds(self) -> float:
        """Training seconds so far, NaN where they are not known."""
        found = [number(self.summary, "seconds")] if self.finished else []
        found += [number(record, "seconds") for record in reversed((*self.evaluations[-1:], *self.metrics[-1:]))]
        return next((value for value in found if np.isfinite(value)), float("nan"))

    @property
    def scores_held_out_prompts(self) -> bool:
        """False where the recipe evaluates on the very prompts it trains on."""
        trained = self.recipe.get("prompts")
        evaluate = self.recipe.get("evaluate")
        scored = evaluate.get("prompts") if isinstance(evaluate, dict) else None
        return trained in (None, "playground", "playground-search") or scored not in (None, trained)

    @cached_property
    def metric_names(self) -> list[str]:
        """Keys of metrics that are numbers, in order of appearance."""
        names: dict[str, None] = {}
        for record in self.metrics:
            names |= {key: None for key, value in record.items() if isinstance(value, int | float) and not isinstance(value, bool)}
        return list(names)

    def series(self, name: str) -> Array:
        """A metric at every step, [N]; NaN where it is missing."""
        return np.array([number(record, name) for record in self.metrics], dtype=float)


def load(folder: Path) -> Run:
    """Everything the report shows of a run."""
    text = _text(folder / "recipe.toml")
    recipe: Record = {}
    with suppress(tomllib.TOMLDecodeError):
        recipe = tomllib.loads(text)
    return Run(
        folder=folder,
        recipe_text=text,
        recipe=recipe,
        environment=_object(folder / "environment.json"),
        metrics=_by_step(_records(folder / "metrics.jsonl")),
        evaluations=_by_step(_records(folder / "evaluations.jsonl")),
        samples=_samples(folder / "samples"),
        guards=_records(folder / "guards.jsonl"),
        summary=_object(folder / "summary.json"),
    )


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""


def _json(path: Path) -> Any:
    with suppress(ValueError, RecursionError):
        return json.loads(_text(path))
    return None


def _object(path: Path) -> Record:
    found = _json(path)
    return found if isinstance(found, dict) else {}


def _records(path: Path) -> list[Record]:
    """The objects of a lines file that say which step they are of."""
    try:
        found = read_lines(path)
    except (OSError, UnicodeDecodeError):
        return []
    return [record for record in found if isinstance(record, dict) and np.isfinite(number(record, "step"))]


def _by_step(records: list[Record]) -> list[Record]:
    # a resumed run repeats the steps after its last checkpoint; what came later holds
    latest = {int(record["step"]): record for record in records}
    return [latest[step] for step in sorted(latest)]


def _samples(folder: Path) -> dict[int, list[Sample]]:
    found = {}
    for index in sorted(folder.glob("step-*/index.json")):
        digits = index.parent.name.removeprefix("step-")
        entries = _json(index)
        if digits.isdecimal() and isinstance(entries, list):
            samples = [_sample(index.parent, entry) for entry in entries if isinstance(entry, dict)]
            if samples:
                found[int(digits)] = samples
    return dict(sorted(found.items()))


def _sample(folder: Path, entry: Record) -> Sample:
    # only the name: an index must not make the report embed files from elsewhere
    name = Path(str(entry.get("file") or "missing")).name
    return Sample(
        folder / name, str(entry.get("prompt", "")), str(entry.get("tag") or ""), number(entry, "score"), str(entry.get("note") or "")
    )
