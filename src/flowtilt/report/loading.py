"""What a run's folder holds, read leniently: a missing, torn or odd file is a missing piece, never an error."""

from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import numpy as np

from flowtilt.config.held_out import is_held_out
from flowtilt.estimate import UNKNOWN, Estimate
from flowtilt.io.files import renamed
from flowtilt.io.locks import is_held
from flowtilt.io.run_folder import RunFolder, SamplesFolder, step_of
from flowtilt.report.image_scores import change, estimate_of, read_image_scores, score_range
from flowtilt.report.numbers import Array, counted, number
from flowtilt.report.reading import Reader, Record
from flowtilt.rewards.about import Bounds

__all__ = ["Record", "Run", "Sample", "load"]


@dataclass(frozen=True)
class Sample:
    """One kept image of an evaluation. `note` says why it is wrong and is empty where it is right."""

    path: Path
    prompt: str
    tag: str
    score: float  # NaN where there is none
    note: str
    source: Path | None = None  # the source image of an edit


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
    held: bool = False  # whether a trainer is at work in the folder
    lost: dict[str, str] = field(default_factory=dict)  # file -> what of it could not be read

    @property
    def name(self) -> str:
        return str(self.summary.get("recipe") or self.recipe.get("name") or self.folder.resolve().name)

    @property
    def step(self) -> int:
        """The last step that was logged; 0 before the first."""
        return max((int(record["rollout"]) for record in (*self.metrics, *self.evaluations)), default=0)

    @property
    def finished(self) -> bool:
        """Whether the summary is about all that was logged: a run that was made longer leaves an older one behind."""
        return bool(self.summary) and not self.held and not number(renamed(self.summary), "rollouts") < self.step

    @property
    def state(self) -> str:
        """ "finished", "running", "stopped by a guard" or "interrupted"."""
        if self.finished:
            return "finished"
        if self.held:
            return "running"
        stopped = self.recipe.get("guards") == "stop" and any(number(guard, "rollout") == self.step for guard in self.guards)
        return "stopped by a guard" if stopped else "interrupted"

    @property
    def touched(self) -> float:
        """When something was last logged, in seconds since 1970; NaN where nothing was."""
        times = [_modified(self.folder / name) for name in (*RunFolder.logs(), RunFolder.environment)]
        return max((time for time in times if time is not None), default=float("nan"))

    @property
    def planned_steps(self) -> int | None:
        steps = self.recipe.get("rollouts", self.recipe.get("steps"))  # its name in 0.1.0
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
        trained, evaluate = self.recipe.get("prompts"), self.recipe.get("evaluate")
        scored = evaluate.get("prompts") if isinstance(evaluate, dict) else None
        return is_held_out(trained if isinstance(trained, str) else "playground", scored if isinstance(scored, str) else None)

    @property
    def column(self) -> str:
        """The reward, or "reward/detail", that the newest evaluation is judged by; "" where it is not known."""
        return next((str(record["column"]) for record in reversed(self.evaluations) if record.get("column")), "")

    @cached_property
    def score_range(self) -> Bounds | None:
        """The lowest and the highest score that there can be; none where there are no bounds, or they are not known."""
        newest = self._images_of(int(self.evaluations[-1]["rollout"])) if self.evaluations else None
        return score_range(newest or {"column": self.column})

    def _images_of(self, step: int) -> Record | None:
        """The score of every image of an evaluation, none where they are not kept."""
        return read_image_scores(Reader(RunFolder(self.folder).samples_at(step).path).object(SamplesFolder.scores))

    @cached_property
    def estimates(self) -> list[Estimate]:
        """The score of each evaluation with its interval over prompts, which runs of 0.1.0 did not log."""
        return [_estimate(record) for record in self.evaluations]

    @cached_property
    def change(self) -> Estimate:
        """The newest score minus that of step 0, image by image from the same noise; NaN where either is missing."""
        scored = [(int(record["rollout"]), e.value) for record, e in zip(self.evaluations, self.estimates, strict=True) if e.known]
        if len(scored) < 2 or scored[0][0]:
            return Estimate(np.nan, kind=UNKNOWN)
        found = change(*(self._images_of(step) for step, _ in (scored[0], scored[-1])))
        return found if found.known else found._replace(value=scored[-1][1] - scored[0][1])

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


def load(folder: Path, held: bool | None = None) -> Run:
    """Everything the report shows of a run.

    Args:
        held: whether a trainer is at work in the folder; none asks its lock.
    """
    reader = Reader(folder)
    metrics, evaluations = _by_step(reader.steps(RunFolder.metrics)), _by_step(reader.steps(RunFolder.evaluations))
    unscored = sum(not np.isfinite(number(record, "score")) for record in evaluations)
    if unscored:
        reader.lose(RunFolder.evaluations, f"{counted(unscored, 'evaluation')} without a score")
    odd = sum(value is not None and not isinstance(value, int | float) for record in metrics for value in record.values())
    if odd:
        reader.lose(RunFolder.metrics, f"{counted(odd, 'value')} that {'is no number' if odd == 1 else 'are no numbers'}")
    return Run(
        folder=folder,
        recipe_text=reader.text(RunFolder.recipe),
        recipe=reader.toml(RunFolder.recipe),
        environment=reader.object(RunFolder.environment),
        metrics=metrics,
        evaluations=evaluations,
        samples=_samples(reader),
        guards=reader.steps(RunFolder.guards),
        summary=reader.object(RunFolder.summary),
        held=is_held(folder) if held is None else held,
        lost=reader.lost,
    )


def _estimate(record: Record) -> Estimate:
    logged, score = record.get("estimate"), number(record, "score")
    images = number(record, "images")
    if not isinstance(logged, dict):
        return Estimate(score, kind=UNKNOWN, images=int(images) if images >= 1 else 0)
    return estimate_of(logged)._replace(value=score)


def _modified(path: Path) -> float | None:
    try:
        return path.stat().st_mtime
    except OSError:
        return None


def _by_step(records: list[Record]) -> list[Record]:
    # a resumed run repeats the steps after its last checkpoint; what came later holds
    latest = {int(record["rollout"]): record for record in records}
    return [latest[step] for step in sorted(latest)]


def _indices(folder: Path) -> list[Path]:
    try:
        return sorted(folder.glob(f"*/{SamplesFolder.index}"))
    except OSError:
        return []


def _samples(reader: Reader) -> dict[int, list[Sample]]:
    found = {}
    for index in _indices(RunFolder(reader.folder).samples):
        step = step_of(index.parent.name)
        if step is None:
            continue
        name = str(index.relative_to(reader.folder))
        entries = reader.json(name)
        samples = [_sample(index.parent, entry) for entry in entries if isinstance(entry, dict)] if isinstance(entries, list) else []
        if samples:
            found[step] = samples
        elif name not in reader.lost and entries != []:
            reader.lose(name)
    return dict(sorted(found.items()))


def _sample(folder: Path, entry: Record) -> Sample:
    # only the name: an index must not make the report embed files from elsewhere
    name, source = (Path(str(entry.get(key) or "")).name for key in ("file", "source"))
    return Sample(
        folder / (name or "missing"),
        str(entry.get("prompt", "")),
        str(entry.get("tag") or ""),
        number(entry, "score"),
        str(entry.get("note") or ""),
        folder / source if source else None,
    )
