"""Sends a run's figures to wandb, TensorBoard and trackio, beside the run's own files.

A tracker never costs a run: its first error becomes a warning, and the run goes on without it.
"""

import importlib
import importlib.util
import json
import os
import secrets
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any, Protocol

import numpy as np
from PIL import Image

from flowtilt.config import Recipe
from flowtilt.errors import UserError
from flowtilt.evaluate import Evaluation
from flowtilt.io.files import write_json
from flowtilt.io.images import to_pil
from flowtilt.io.run_folder import RunFolder
from flowtilt.io.user_errors import first_line

TRACKERS = ("wandb", "tensorboard", "trackio")


@dataclass(frozen=True)
class Picture:
    """An image with its caption."""

    image: Image.Image
    caption: str


Value = float | str | Picture


class Sink(Protocol):
    """One tracker."""

    def send(self, kind: str, step: int, values: Mapping[str, Value]) -> None:
        """Takes values of a step; `kind` names the occasion, which comes at most once per step."""
        ...

    def close(self) -> None:
        """Called once, at the end."""
        ...


class Hosted:
    """wandb or trackio, which share their interface. A resumed run continues the tracker's run and sends no step twice.

    Its id, its project and the last step sent are in the run's folder, in `<tracker>.json`.
    """

    def __init__(self, name: str, module: ModuleType, run: Path, recipe: Recipe):
        self._module, self._file = module, RunFolder(run).tracker(name)
        known = self._file.is_file()
        self._state: dict[str, Any] = json.loads(self._file.read_text(encoding="utf-8")) if known else {}
        if not known:
            project = (name == "wandb" and os.environ.get("WANDB_PROJECT")) or recipe.name
            self._state = {"id": secrets.token_hex(4), "project": project, "sent": {}}
        own = self._state["id"]
        options: dict[str, Any] = {"project": self._state["project"], "config": recipe.model_dump(mode="json")}
        if name == "wandb":
            offline = {} if _may_log_in(module) else {"mode": "offline"}
            module.init(name=run.resolve().name, id=own, resume="allow", **options, **offline)
        else:  # trackio finds a run by its name
            module.init(name=f"{run.resolve().name}-{own}", resume="allow" if known else "never", **options)
        write_json(self._file, self._state)

    def send(self, kind: str, step: int, values: Mapping[str, Value]) -> None:
        if step <= self._state["sent"].get(kind, -1):  # before a kill, which set the run back
            return
        picture = getattr(self._module, "Image", None)
        plain: dict[str, Any] = {key: value for key, value in values.items() if not isinstance(value, Picture)}
        if picture:
            plain |= {key: picture(value.image, caption=value.caption) for key, value in values.items() if isinstance(value, Picture)}
        if plain:
            self._module.log(plain, step=step)
        self._state["sent"][kind] = step
        write_json(self._file, self._state)

    def close(self) -> None:
        self._module.finish()


class TensorBoard:
    """Event files in the run's folder; what an interrupted run logged after `step` is hidden."""

    def __init__(self, run: Path, step: int):
        from torch.utils.tensorboard import SummaryWriter

        folder = RunFolder(run).tensorboard
        self._writer: Any = SummaryWriter(str(folder), purge_step=(step + 1 if step else 0) if folder.is_dir() else None)

    def send(self, kind: str, step: int, values: Mapping[str, Value]) -> None:
        for name, value in values.items():
            if isinstance(value, Picture):
                self._writer.add_image(name, np.asarray(value.image), step, dataformats="HWC")
            elif isinstance(value, str):
                self._writer.add_text(name, value, step)
            else:
                self._writer.add_scalar(name, value, step)
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()


class Trackers:
    """All trackers of a run. One that fails costs one warning and is left out from then on.

    Args:
        sinks: functions that open them, by name.
        warn: takes a line for a person.
    """

    def __init__(self, sinks: Mapping[str, Callable[[], Sink]] | None = None, warn: Callable[[str], None] = print):
        self._warn = warn
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
        flat = {f"summary/{key}/{part}": v for key, value in summary.items() if isinstance(value, dict) for part, v in value.items()}
        flat |= {f"summary/{key}": value for key, value in summary.items()}
        self._send("summary", step, {key: float(value) for key, value in flat.items() if isinstance(value, int | float)})

    def close(self) -> None:
        """Ends them all."""
        for name, sink in list(self._sinks.items()):
            with self._guarded(name):
                sink.close()
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
            if not _may_log_in(importlib.import_module("wandb")):
                print("track: wandb has no login, so it logs offline; `wandb login` before a run, `wandb sync` after it", file=sys.stderr)
        except (Exception, SystemExit):
            pass  # what is wrong with it is said when the run opens it


def _may_log_in(wandb: ModuleType) -> bool:
    """Whether wandb has a key, or was told by WANDB_MODE what to do; asks nobody and needs no network."""
    login = getattr(wandb, "login", None)
    if "WANDB_MODE" in os.environ or login is None:
        return True
    try:
        return bool(login(prompt=False, verify=False))
    except TypeError:  # an older release, which can only ask
        return True


def open_trackers(recipe: Recipe, run: Path, step: int, warn: Callable[[str], None]) -> Trackers:
    """The trackers that a recipe asks for, of a run after `step` rollouts."""

    def opening(name: str) -> Callable[[], Sink]:
        if name == "tensorboard":
            return lambda: TensorBoard(run, step)
        return lambda: Hosted(name, importlib.import_module(name), run, recipe)

    return Trackers({name: opening(name) for name in recipe.track}, warn)


def _pictures(found: Evaluation) -> list[Picture]:
    """An evaluation's samples, each with its caption and score."""
    rows = [str(row["prompt"]) + ("" if row["score"] is None else f" ({row['score']})") for row in found.sample_rows]
    return [Picture(image, text) for image, text in zip(to_pil(found.samples) if rows else [], rows, strict=True)]
