"""A run's folder: made, found again, and put back to where its newest checkpoint is.

recipe.toml, torchrun.txt, environment.json, metrics.jsonl, evaluations.jsonl, guards.jsonl, checkpoints/, samples/,
lora/, on/ (what lies beneath it), fake/ (RTDMD's fake score), summary.json, report.html.
"""

import json
import shutil
from pathlib import Path

from flowtilt import distributed
from flowtilt.config import Recipe, load_recipe, to_toml
from flowtilt.errors import UserError
from flowtilt.evaluate import Evaluation
from flowtilt.files import append_line, clean, disk_errors, read_lines, whole_folder, write_atomic, write_json
from flowtilt.pictures import to_png
from flowtilt.trust import RECIPE, of_recipe, remember

JOB = "torchrun.txt"
"""The torchrun job that made a run, so that its restarts find it; never written for a run without torchrun."""
LOGS = ("metrics.jsonl", "evaluations.jsonl", "guards.jsonl")
MAY_CHANGE = ("steps", "run", "checkpoint", "evaluate", "guards", "track", "micro_batch", "shard")
"""Keys that a resumed run may set anew: they do not touch what was computed before."""


def create(recipe: Recipe) -> Path:
    """Makes a new run's folder with its recipe.

    Raises:
        UserError: the folder that the recipe names holds something already, or can't be made.
    """
    if recipe.run:
        folder = Path(recipe.run)
        if folder.is_dir():
            clean(folder)
        if folder.exists() and (not folder.is_dir() or any(path.name != JOB for path in folder.iterdir())):
            raise UserError(f"run {folder}: not empty; go on with `flowtilt train --resume {folder}` or choose another run=…")
    else:
        folder, number = Path("runs") / recipe.name, 2
        while folder.exists():
            folder, number = Path("runs") / f"{recipe.name}-{number}", number + 1
    with disk_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
    if name := distributed.job():
        write_atomic(folder / JOB, name)
    write_recipe(folder, recipe)
    return folder


def write_recipe(folder: Path, recipe: Recipe) -> None:
    """Writes a run's recipe, and notes it as the user's own where it runs code of its own."""
    write_atomic(folder / RECIPE, to_toml(recipe))
    if of_recipe(recipe):
        remember(folder)


def of_job(recipe: Recipe, world: distributed.World) -> Path | None:
    """The run that an earlier start of this torchrun job made, where torchrun has restarted it; none where there is none."""
    # where another machine failed, torchrun does not count this one's restart
    if not world.any(distributed.restarts() > 0):
        return None

    def find() -> str | None:
        folders = [Path(recipe.run)] if recipe.run else Path("runs").glob(f"{recipe.name}*")
        made = [folder / JOB for folder in folders if (folder / "recipe.toml").is_file() and (folder / JOB).is_file()]
        ours = [place for place in made if place.read_text() == distributed.job()]
        return str(max(ours, key=lambda place: place.stat().st_mtime).parent) if ours else None

    found = world.first(find)
    return Path(found) if found else None


def open_run(folder: Path, overrides: list[str], recipe: Recipe | None = None) -> Recipe:
    """The recipe of an existing run, with overrides that may change; `recipe` is what the user believes it to be.

    Raises:
        UserError: the folder is no run, the run is another recipe's, or a key may not change.
    """
    if not (folder / "recipe.toml").is_file():
        raise UserError(f"{folder}: not a run (no recipe.toml there); give the folder that training made")
    kept = load_recipe(folder / "recipe.toml")
    for key in (item.partition("=")[0].strip() for item in overrides):
        if key.partition(".")[0] not in MAY_CHANGE:
            raise UserError(f"override {key}: a resumed run can't change it; only {', '.join(MAY_CHANGE)}")
    if recipe is not None:
        ours, theirs = kept.model_dump(exclude=set(MAY_CHANGE)), recipe.model_dump(exclude=set(MAY_CHANGE))
        differing = [key for key in ours if ours[key] != theirs[key]]
        if differing:
            raise UserError(
                f"{folder}: a run of another recipe ({', '.join(differing)} differ); leave the recipe out to go on with the run's own"
            )
    return load_recipe(folder / "recipe.toml", overrides)


def rewind(folder: Path, step: int) -> None:
    """Takes back what was written after `step`, so that the resumed run writes it once, and what a kill left half-written."""
    for place in (folder, folder / "checkpoints", folder / "samples"):
        clean(place)
    for later in (folder / "checkpoints").glob("step-*"):
        if int(later.name.removeprefix("step-")) > step:
            shutil.rmtree(later)
    for name in LOGS:
        if (folder / name).exists():
            kept = [record for record in read_lines(folder / name) if record["step"] <= step]
            write_atomic(folder / name, "".join(json.dumps(record) + "\n" for record in kept))
    for samples in (folder / "samples").glob("step-*"):
        if int(samples.name.removeprefix("step-")) > step:
            shutil.rmtree(samples)


def save_evaluation(folder: Path, step: int, seconds: float, found: Evaluation) -> None:
    """Logs an evaluation and keeps its samples as PNG files with their captions and verdicts."""
    with whole_folder(folder / "samples" / f"step-{step:06d}") as temporary:
        for k, (image, row) in enumerate(zip(found.samples, found.sample_rows, strict=True)):
            row["file"] = f"{k:02d}.png"
            (temporary / f"{k:02d}.png").write_bytes(to_png(image))
        write_json(temporary / "index.json", found.sample_rows)
    record = {
        "step": step,
        "column": found.column,
        "score": found.score,
        "images": found.images,
        "by_tag": found.by_tag,
        "rewards": found.rewards,
        "missing": found.missing,
        "seconds": seconds,
    }
    append_line(folder / "evaluations.jsonl", record)
