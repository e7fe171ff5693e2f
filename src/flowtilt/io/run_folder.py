"""The folders that flowtilt writes, and the name of every file in them.

On the class a file is its name, on an instance its path: `RunFolder.metrics` is "metrics.jsonl", `RunFolder(place).metrics` the file.
"""

import re
from pathlib import Path
from typing import Self, overload


class _Named:
    """The name of a file or folder."""

    def __init__(self, name: str):
        self.name = name

    @overload
    def __get__(self, folder: None, kind: type) -> str: ...
    @overload
    def __get__(self, folder: "_Folder", kind: type) -> Path: ...
    def __get__(self, folder: "_Folder | None", kind: type) -> str | Path:
        return self.name if folder is None else folder.path / self.name


class _Folder:
    def __init__(self, path: Path | str):
        self.path = Path(path)


class RunFolder(_Folder):
    """What a training run writes."""

    recipe = _Named("recipe.toml")
    sources = _Named("sources.json")
    """What the run was made of: the files that the recipe names, with their SHA-256."""
    job = _Named("torchrun.txt")
    """The torchrun job that made the run, so that its restarts find it; never written for a run without torchrun."""
    environment = _Named("environment.json")
    metrics = _Named("metrics.jsonl")
    evaluations = _Named("evaluations.jsonl")
    guards = _Named("guards.jsonl")
    summary = _Named("summary.json")
    stopped = _Named("stopped.json")
    """Where a guard has ended the run."""
    report = _Named("report.html")
    lora = _Named("lora")
    network = _Named("transformer")
    """All weights, of a run that trains them all."""
    base_loras = _Named("on")
    """Copies of the LoRAs that lie below the trained one."""
    fake_score = _Named("fake")
    """RTDMD's."""
    checkpoints = _Named("checkpoints")
    samples = _Named("samples")
    rollouts = _Named("rollouts")
    """Where `log.rollouts` is set."""
    tensorboard = _Named("tensorboard")
    judges = _Named("judges")
    """The answers of judges, a file for each judge and process."""

    @classmethod
    def logs(cls) -> tuple[str, ...]:
        """The files with a line per step."""
        return cls.metrics, cls.evaluations, cls.guards

    @classmethod
    def by_step(cls) -> tuple[str, ...]:
        """The folders with a folder for each of some steps."""
        return cls.checkpoints, cls.samples, cls.rollouts

    @classmethod
    def written(cls, trackers: tuple[str, ...]) -> set[str]:
        """What flowtilt replaces as a whole in a run's folder, besides the folders of `by_step`."""
        files = (cls.recipe, cls.sources, cls.job, cls.environment, *cls.logs(), cls.summary, cls.stopped, cls.report)
        return {*files, cls.lora, cls.network, cls.base_loras, cls.fake_score, *(f"{name}.json" for name in trackers)}

    @classmethod
    def around(cls, path: Path) -> Self | None:
        """The run that a file or folder two levels below it is in, such as one of its checkpoints; none elsewhere."""
        found = cls(path.resolve().parent.parent)
        return found if found.is_run() else None

    def is_run(self) -> bool:
        """Whether there is a recipe."""
        return self.recipe.is_file()

    def checkpoint(self, step: int) -> "CheckpointFolder":
        return CheckpointFolder(self.checkpoints / step_name(step))

    def samples_at(self, step: int) -> "SamplesFolder":
        return SamplesFolder(self.samples / step_name(step))

    def rollout(self, step: int) -> "RolloutFolder":
        return RolloutFolder(self.rollouts / step_name(step))

    def role(self, name: str) -> Path:
        """Where the LoRA of a further role is written."""
        return self.path / name

    def tracker(self, name: str) -> Path:
        """What a tracker needs to go on."""
        return self.path / f"{name}.json"


class CheckpointFolder(_Folder):
    """One checkpoint: beside the state a file of tensors for each LoRA role and optimizer."""

    state = _Named("state.json")
    ema = _Named("ema.safetensors")


class SamplesFolder(_Folder):
    """Images that an evaluation of a run kept."""

    index = _Named("index.json")
    """A row per kept image."""
    scores = _Named("scores.json")
    """The score of every image; see `report.image_scores`."""


class RolloutFolder(_Folder):
    """A rollout's images, and a table with a row for each; see `training.rollout_log`."""

    table = _Named("metadata.parquet")


class EvaluationFolder(_Folder):
    """What `flowtilt evaluate` writes."""

    protocol = _Named("protocol.json")
    scores = _Named("scores.jsonl")
    results = _Named("results.json")
    report = _Named("report.html")
    pictures = _Named("pictures")
    images = _Named("images")
    judges = _Named("judges")
    """As a run's."""


def step_name(step: int) -> str:
    """The name of a step's folder."""
    return f"step-{step:06d}"


def step_of(name: str) -> int | None:
    """The step of a folder that flowtilt names so; none for any other name."""
    match = re.fullmatch(r"step-([0-9]{6,})", name)
    number = int(match[1]) if match and len(match[1]) < 20 else None
    return number if number is not None and name == step_name(number) else None
