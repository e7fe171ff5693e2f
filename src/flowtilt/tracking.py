"""Where metrics go besides the run's own files: wandb, TensorBoard and trackio behind one small interface."""

import importlib
import importlib.util
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any, Protocol

from flowtilt.errors import UserError

TRACKERS = ("wandb", "tensorboard", "trackio")


class Sink(Protocol):
    """Takes a step's metrics; `close` is called once, also after an error."""

    def log(self, step: int, metrics: Mapping[str, float]) -> None: ...

    def close(self) -> None: ...


class Tracker:
    """wandb or trackio, whose calls are the same."""

    def __init__(self, module: ModuleType, run: Path, config: dict[str, Any]):
        self._module = module
        module.init(project="flowtilt", name=run.name, config=config)

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        self._module.log(dict(metrics), step=step)

    def close(self) -> None:
        self._module.finish()


class TensorBoard:
    """Event files in the run's folder."""

    def __init__(self, writer: Any):
        self._writer = writer

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        for name, value in metrics.items():
            self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        self._writer.close()


def check_installed(names: Sequence[str]) -> None:
    """Says before a run begins that a tracker is missing.

    Raises:
        UserError: one is not installed; names the extra.
    """
    for name in names:
        if importlib.util.find_spec(name) is None:
            raise UserError(f"track: {name} is not installed; pip install 'flowtilt[track]'")


def open_sinks(names: Sequence[str], run: Path, config: dict[str, Any]) -> list[Sink]:
    """The trackers a recipe asks for."""
    sinks: list[Sink] = []
    for name in names:
        if name == "tensorboard":
            from torch.utils.tensorboard import SummaryWriter

            sinks.append(TensorBoard(SummaryWriter(str(run / "tensorboard"))))
        else:
            sinks.append(Tracker(importlib.import_module(name), run, config))
    return sinks
