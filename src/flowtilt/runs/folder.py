"""A run's folder: made, found again, and put back to where its newest checkpoint is.

`io.run_folder` names its files.
"""

import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from flowtilt.build import inputs
from flowtilt.config import Recipe, load_recipe, to_toml
from flowtilt.config.trust import of_recipe, remember
from flowtilt.distributed import world as distributed
from flowtilt.errors import UserError
from flowtilt.io.files import (
    clean,
    disk_errors,
    made_by,
    parse_lines,
    read_data,
    read_errors,
    read_lines,
    write_atomic,
    write_lines,
)
from flowtilt.io.locks import FILES as LOCKS
from flowtilt.io.locks import HOLDER, Hold
from flowtilt.io.run_folder import RunFolder, step_of
from flowtilt.methods import loaded
from flowtilt.runs import checkpoint
from flowtilt.runs.changing import fixed, may_change, told
from flowtilt.runs.tracking import TRACKERS

WRITTEN = RunFolder.written(TRACKERS) | {HOLDER}
"""What flowtilt writes into a run's folder, besides the folders with a folder per step."""
RUN = "a training run"
PATIENCE = 60.0
"""Seconds that a restart of torchrun waits for the end of the processes before it."""


def create(recipe: Recipe) -> Hold:
    """Makes a new run's folder with its recipe, and holds it. No other process gets the same folder.

    Raises:
        UserError: the folder that the recipe names holds something already, or can't be made.
    """
    hold = _claim(Path(recipe.run)) if recipe.run else _next(Path("runs"), recipe.name)
    try:
        if name := distributed.job():
            write_atomic(RunFolder(hold.folder).job, name)
        write_recipe(hold.folder, recipe)
    except BaseException:
        hold.release()
        raise
    return hold


def _next(runs: Path, name: str) -> Hold:
    """runs/name, or the first number of it that nobody has."""
    number = 1
    with disk_errors(runs):
        runs.mkdir(parents=True, exist_ok=True)
        while True:
            folder = runs / (name if number == 1 else f"{name}-{number}")
            try:
                folder.mkdir()
            except FileExistsError:
                number += 1
            else:
                return Hold(folder, RUN)


def _claim(folder: Path) -> Hold:
    """The folder of that name, if nothing is in it but what a killed start leaves."""
    _check_free(folder)
    with disk_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
    hold = Hold(folder, RUN)
    try:
        _check_free(folder)  # another start may have been quicker
        with read_errors(folder):
            clean(folder, WRITTEN.__contains__)
    except BaseException:
        hold.release()
        raise
    return hold


def _check_free(folder: Path) -> None:
    with read_errors(folder):
        if not folder.exists():
            return
        if not folder.is_dir():
            raise UserError(f"run {folder}: a file; choose another run=…")
        names = {path.name for path in folder.iterdir()}
    left = names - {RunFolder.job, *LOCKS}
    if RunFolder.recipe in left:
        raise UserError(f"run {folder}: not empty; go on with `flowtilt train --resume {folder}` or choose another run=…")
    if any(made_by(name) not in (RunFolder.recipe, RunFolder.job, HOLDER) for name in left):
        raise UserError(f"run {folder}: not empty and no run; choose another run=…")


def write_recipe(folder: Path, recipe: Recipe) -> None:
    """Writes a run's recipe, and notes it as the user's own where it runs code of its own."""
    write_atomic(RunFolder(folder).recipe, to_toml(recipe))
    if of_recipe(recipe):
        remember(folder)


def of_job(recipe: Recipe, world: distributed.World) -> Path | None:
    """The run that an earlier start of this torchrun job made, where torchrun has restarted it; none where there is none."""
    # where another machine failed, torchrun does not count this one's restart
    if not world.any(distributed.restarts() > 0):
        return None

    def find() -> str | None:
        folders = [Path(recipe.run)] if recipe.run else Path("runs").glob(f"{recipe.name}*")
        made = [run.job for run in map(RunFolder, folders) if run.is_run() and run.job.is_file()]
        ours = [place for place in made if place.read_text(encoding="utf-8") == distributed.job()]
        return str(max(ours, key=lambda place: place.stat().st_mtime).parent) if ours else None

    found = world.on_rank0(find)
    return Path(found) if found else None


def open_run(
    folder: Path | str, overrides: Sequence[str], recipe: Recipe | None = None, before_code: Callable[[Recipe], None] = lambda found: None
) -> Recipe:
    """The recipe of an existing run, with overrides that may change; `recipe` is what the user believes it to be.

    Args:
        before_code: called with the recipe as it is stored, before code of the run's own is loaded.

    Raises:
        UserError: the folder is no run, the run is another recipe's, or a key may not change.
    """
    folder = Path(folder)
    check_run(folder)
    place = RunFolder(folder).recipe
    kept = inputs.found_again(load_recipe(place, stored=True), folder)
    for item in overrides:
        if not may_change(item, kept):
            key = item.partition("=")[0].strip()
            raise UserError(f"override {key}: a resumed run can't change it; only {told()}")
    if recipe is not None:
        believed = inputs.found_again(recipe, folder)
        ours, theirs = fixed(kept), fixed(believed)
        differing = [key for key in ours if ours[key] != theirs[key]]
        if differing:
            raise UserError(
                f"{folder}: a run of another recipe ({', '.join(differing)} differ); leave the recipe out to go on with the run's own"
            )
    found = inputs.found_again(load_recipe(place, overrides, stored=True), folder)
    before_code(found)
    return found.model_copy(update={"objective": loaded(found.objective)})


def check_run(folder: Path) -> None:
    """Raises UserError where a folder is no run, or can't be read."""
    with read_errors(folder):
        if folder.is_dir():
            list(folder.iterdir())  # a folder that can't be listed would look empty
        if not RunFolder(folder).is_run():
            raise UserError(f"{folder}: not a run (no {RunFolder.recipe} there); give the folder that training made")


def resume(folder: Path) -> Hold:
    """Holds a run to go on with, and deletes what a kill has left half-written in it.

    Raises:
        UserError: it is no run, another process holds it, or it has made progress and has no checkpoint to go on from.
    """
    check_run(folder)
    hold = Hold(folder, RUN, PATIENCE if distributed.restarts() else 0.0)
    try:
        with read_errors(folder), disk_errors(folder):
            clean(folder, WRITTEN.__contains__)
            for name in RunFolder.by_step():
                clean(folder / name, lambda name: step_of(name) is not None)
        check_progress(folder)
    except BaseException:
        hold.release()
        raise
    return hold


def check_progress(folder: Path) -> None:
    """Raises UserError where a run has got beyond its beginning and has no checkpoint: to go on would begin anew, over its results."""
    if checkpoint.numbered(RunFolder(folder).checkpoints):
        return
    with read_errors(folder):
        steps = [record["rollout"] for name in RunFolder.logs() for record in read_log(folder / name)]
        begun = any((folder / name).exists() for name in (RunFolder.lora, RunFolder.network, RunFolder.summary))
    if begun or max(steps, default=0) > 0:
        reached = f"rollout {max(steps)}" if max(steps, default=0) > 0 else "its first checkpoint"
        how = f" (lora.init={folder} begins with its weights)" if RunFolder(folder).lora.exists() else ""
        raise UserError(
            f"{folder}: has reached {reached}, but checkpoints/ has none to go on from; put its checkpoints back, or start a new run{how}"
        )


def read_log(path: Path) -> list[dict[str, Any]]:
    """The lines of one of a run's logs; those that don't say their rollout are left out."""
    return [record for record in read_lines(path) if _has_step(record)]


def _has_step(record: dict[str, Any]) -> bool:
    return isinstance(record.get("rollout"), int) and not isinstance(record["rollout"], bool)


def rewind(folder: Path, step: int) -> None:
    """Takes back what was logged after `step`, so that the resumed run writes it once; the user's own files stay."""
    with read_errors(folder):
        for name in RunFolder.logs():
            records, damaged = parse_lines(read_data(folder / name))
            kept = [record for record in records if _has_step(record) and record["rollout"] <= step]
            if damaged or (folder / name).exists():
                read_lines(folder / name)  # warns of what is damaged
                write_lines(folder / name, kept)
        run = RunFolder(folder)
        for number, images in [*checkpoint.numbered(run.samples), *checkpoint.numbered(run.rollouts)]:
            if number > step:
                with disk_errors(images):
                    shutil.rmtree(images)


def scores(folder: Path) -> tuple[float | None, float | None]:
    """The score before training and the newest one; none where that evaluation is missing."""
    found = {record["rollout"]: record.get("score") for record in read_log(RunFolder(folder).evaluations)}
    return found.get(0), found[max(found)] if found else None
