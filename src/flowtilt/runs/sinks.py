"""The trackers, each behind the same three calls: made, sent values of a step, closed."""

import importlib
import json
import os
import re
import secrets
import time
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any, Protocol

import numpy as np
from PIL import Image

from flowtilt.config import Recipe, to_toml
from flowtilt.distributed.sameness import leaves
from flowtilt.io.files import write_json
from flowtilt.io.run_folder import RunFolder


@dataclass(frozen=True)
class Picture:
    """An image with its caption."""

    image: Image.Image
    caption: str


Value = float | str | Picture


class Sink(Protocol):
    """One tracker."""

    def send(self, kind: str, step: int, values: Mapping[str, Value]) -> None:
        """Takes values of a rollout; `kind` names the occasion, which comes at most once per rollout."""
        ...

    def close(self, finished: bool) -> None:
        """Called once, at the end of this process's work; `finished` says whether the run is at its end, too."""
        ...


class _Remembered(ABC):
    """A tracker with runs of its own. A resumed run continues the tracker's run and sends no rollout twice.

    The tracker's id and project of the run, and the last rollout that was sent, are in the run's folder, in `<tracker>.json`.
    """

    def __init__(self, name: str, run: Path, project: str):
        self._file = RunFolder(run).tracker(name)
        self._known = self._file.is_file()
        self._state: dict[str, Any] = json.loads(self._file.read_text(encoding="utf-8")) if self._known else {}
        if not self._known:
            self._state = {"id": secrets.token_hex(4), "project": project, "sent": {}}

    def _save(self) -> None:
        write_json(self._file, self._state)

    def send(self, kind: str, step: int, values: Mapping[str, Value]) -> None:
        """As `Sink.send`."""
        if step <= self._state["sent"].get(kind, -1):  # before a kill, which set the run back
            return
        self._log(step, values)
        self._state["sent"][kind] = step
        self._save()

    @abstractmethod
    def _log(self, step: int, values: Mapping[str, Value]) -> None:
        """Sends values of a rollout."""


class Hosted(_Remembered):
    """wandb or trackio, which share their interface."""

    def __init__(self, name: str, module: ModuleType, run: Path, recipe: Recipe):
        super().__init__(name, run, (name == "wandb" and os.environ.get("WANDB_PROJECT")) or recipe.name)
        self._module = module
        own = self._state["id"]
        options: dict[str, Any] = {"project": self._state["project"], "config": recipe.model_dump(mode="json")}
        if name == "wandb":
            offline = {} if may_log_in(module) else {"mode": "offline"}
            module.init(name=run.resolve().name, id=own, resume="allow", **options, **offline)
        else:  # trackio finds a run by its name
            module.init(name=f"{run.resolve().name}-{own}", resume="allow" if self._known else "never", **options)
        self._save()

    def _log(self, step: int, values: Mapping[str, Value]) -> None:
        picture = getattr(self._module, "Image", None)
        plain: dict[str, Any] = {key: value for key, value in values.items() if not isinstance(value, Picture)}
        if picture:
            plain |= {key: picture(value.image, caption=value.caption) for key, value in values.items() if isinstance(value, Picture)}
        if plain:
            self._module.log(plain, step=step)

    def close(self, finished: bool) -> None:
        """As `Sink.close`."""
        self._module.finish()


class MLflow(_Remembered):
    """mlflow, through its client alone: nothing of its global state is set."""

    def __init__(self, run: Path, recipe: Recipe):
        super().__init__("mlflow", run, os.environ.get("MLFLOW_EXPERIMENT_NAME") or recipe.name)
        tracking = importlib.import_module("mlflow.tracking")
        self._entities = importlib.import_module("mlflow.entities")
        self._client: Any = tracking.MlflowClient()
        if self._known:
            self._id = self._state["id"]
            self._client.update_run(self._id, status="RUNNING")
        else:
            found = self._client.get_experiment_by_name(self._state["project"])
            experiment = found.experiment_id if found else self._client.create_experiment(self._state["project"])
            self._id = self._state["id"] = self._client.create_run(experiment, run_name=run.resolve().name).info.run_id
        self._log_recipe(recipe)
        self._save()

    def _log_recipe(self, recipe: Recipe) -> None:
        """The recipe as parameters, which a resumed run can't change, and as a file, which it replaces."""
        self._client.log_text(self._id, to_toml(recipe), RunFolder.recipe)
        if not self._known:
            params = [self._entities.Param(_allowed(key), value) for key, value in _as_text(recipe).items()]
            for start in range(0, len(params), 100):  # mlflow takes no more at once
                self._client.log_batch(self._id, params=params[start : start + 100])

    def _log(self, step: int, values: Mapping[str, Value]) -> None:
        now = int(time.time() * 1000)
        metrics = [
            self._entities.Metric(_allowed(key), float(value), now, step)
            for key, value in values.items()
            if not isinstance(value, str | Picture)
        ]
        if metrics:
            self._client.log_batch(self._id, metrics=metrics)
        for key, value in values.items():
            if isinstance(value, str):
                self._client.set_tag(self._id, _allowed(key), f"rollout {step}: {value}")
            elif isinstance(value, Picture):
                self._client.log_image(self._id, value.image, key=_allowed(key), step=step)
        captions = {key: value.caption for key, value in values.items() if isinstance(value, Picture)}
        if captions:  # mlflow's images have none
            self._client.log_dict(self._id, captions, f"captions/rollout-{step:06d}.json")

    def close(self, finished: bool) -> None:
        """As `Sink.close`."""
        self._client.set_terminated(self._id, "FINISHED" if finished else "KILLED")


def _allowed(key: str) -> str:
    """A name as mlflow takes it."""
    return re.sub(r"[^\w./ :-]", "_", key)


def _as_text(recipe: Recipe) -> dict[str, str]:
    """A recipe's values as text by their keys as they are overridden, objective.beta; empty tables have none."""
    values = leaves(recipe.model_dump(mode="json"))
    return {key: value if isinstance(value, str) else json.dumps(value) for key, value in values.items() if value != {}}


class TensorBoard:
    """Event files in the run's folder; what an interrupted run logged after `step` is hidden."""

    def __init__(self, run: Path, recipe: Recipe, step: int):
        from torch.utils.tensorboard import SummaryWriter

        folder = RunFolder(run).tensorboard
        self._writer: Any = SummaryWriter(str(folder), purge_step=(step + 1 if step else 0) if folder.is_dir() else None)
        self._writer.add_text("recipe", _as_code(to_toml(recipe)), step)

    def send(self, kind: str, step: int, values: Mapping[str, Value]) -> None:
        """As `Sink.send`."""
        for name, value in values.items():
            if isinstance(value, Picture):
                self._writer.add_image(name, np.asarray(value.image), step, dataformats="HWC")
            elif isinstance(value, str):
                self._writer.add_text(name, value, step)
            else:
                self._writer.add_scalar(name, value, step)
        captions = [f"{name}: {value.caption}" for name, value in values.items() if isinstance(value, Picture)]
        if captions:  # TensorBoard's images have none
            self._writer.add_text("captions", _as_code("\n".join(captions)), step)
        self._writer.flush()

    def close(self, finished: bool) -> None:
        """As `Sink.close`."""
        self._writer.close()


def _as_code(text: str) -> str:
    """A block of code in Markdown, whatever the text holds."""
    return "".join(f"    {line}\n" for line in text.splitlines())


def may_log_in(wandb: ModuleType) -> bool:
    """Whether wandb has a key, or was told by WANDB_MODE what to do; asks nobody and needs no network."""
    login = getattr(wandb, "login", None)
    if "WANDB_MODE" in os.environ or login is None:
        return True
    try:
        return bool(login(prompt=False, verify=False))
    except TypeError:  # an older release, which can only ask
        return True
