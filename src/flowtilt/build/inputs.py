"""The files that a recipe names: their whole paths, and how a run knows them again.

A run's sources.json has the SHA-256 of its prompt files (and the source images that those name), reward files (and what those import
from their folder), adapter, model folder and LoRAs. Of large source images and a model folder's large files it covers the size, the
beginning and the end.
"""

import hashlib
import json
import os
import re
import warnings
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from flowtilt.config import Recipe
from flowtilt.config.prompt_data import parse
from flowtilt.errors import UserError
from flowtilt.io.files import digest, read_errors, shown, write_json
from flowtilt.io.run_folder import RunFolder
from flowtilt.io.user_code import neighbours
from flowtilt.lora.find import find
from flowtilt.methods import is_own
from flowtilt.models.opening import fingerprint
from flowtilt.prompts import datasets
from flowtilt.prompts.files import load_prompts
from flowtilt.prompts.sets import is_path

ONCE = ("lora.init", "lora.on", "objective.fake")
"""What is read when a run begins and never again: its checkpoints and its copies (`lora.stacked.keep`) have all of it."""
SOURCE_IMAGE = "source image"
"""The key of an image that a prompt file names."""
_WHOLE = 1 << 20
_ENDS = 1 << 16
_FOLDER_FILES = (".json", ".txt", ".model", ".safetensors", ".bin", ".jsonl", ".parquet")
Entry = dict[str, Any]


def map_paths(recipe: Recipe, change: Callable[[str, str], str]) -> Recipe:
    """The recipe with `change(key, path)` for each file or folder that it names; built-in names, hub ids and addresses stay."""

    def code(key: str, source: str) -> str:
        place, colon, name = source.rpartition(":")
        return f"{change(key, place)}:{name}" if colon and "://" not in source else source

    def lora(key: str, place: str) -> str:
        alpha = None if os.path.exists(place) else re.search(r"@[\d.]+$", place)
        return change(key, place[: alpha.start()]) + alpha[0] if alpha else change(key, place)

    def prompts(key: str, source: str) -> str:
        if data := parse(source):
            local = os.path.isabs(data.dataset) or os.path.isdir(data.dataset)
            return data.moved(change(key, data.dataset)).source() if local else source
        return change(key, source) if is_path(source) else source

    def reward(key: str, value: Any) -> Any:
        if isinstance(value, str):
            return code(key, value)
        source = getattr(value, "source", None)
        return value.model_copy(update={"source": code(key, source)}) if source else value

    m, e, o = recipe.model, recipe.evaluate, recipe.objective
    local = m.path != "playground" and (os.path.isabs(m.path) or os.path.isdir(m.path))
    model = {
        "path": change("model", m.path) if local else m.path,
        "adapter": m.adapter and code("model.adapter", m.adapter),
    }
    loras = {
        "init": recipe.lora.init and lora("lora.init", recipe.lora.init),
        "on": tuple(lora("lora.on", place) for place in recipe.lora.on),
    }
    fake, pairs = getattr(o, "fake", None), getattr(o, "pairs", None)
    objective = {
        **({"fake": lora("objective.fake", fake)} if fake else {}),
        **({"pairs": prompts("objective.pairs", pairs)} if pairs else {}),
        **({"type": code("objective.type", o.type)} if is_own(o.type) else {}),
    }
    return recipe.model_copy(
        update={
            "model": m.model_copy(update=model),
            "prompts": prompts("prompts", recipe.prompts),
            "evaluate": e.model_copy(update={"prompts": e.prompts and prompts("evaluate.prompts", e.prompts)}),
            "rewards": {name: reward(f"rewards.{name}", value) for name, value in recipe.rewards.items()},
            "lora": recipe.lora.model_copy(update=loras),
            "objective": o.model_copy(update=objective) if objective else o,
        }
    )


def whole(recipe: Recipe) -> Recipe:
    """The recipe with absolute paths; what does not exist stays as it was written, for the message that says so."""
    return map_paths(recipe, lambda key, path: os.path.abspath(path) if os.path.exists(path) else path)


def found_again(recipe: Recipe, run: Path) -> Recipe:
    """A run's recipe where the run and its files were moved together: what is gone, but lies unchanged as before beside the run."""
    moved = {entry["path"]: _place(entry, run) for entry in _load(run).get("files", [])}
    return map_paths(whole(recipe), lambda key, path: path if os.path.exists(path) else moved.get(path, path))


def pinned(recipe: Recipe, run: Path) -> Recipe:
    """A run's recipe with the commits of the hub's model and data sets that it began with, where it names no revision."""
    known = {entry["path"]: entry["commit"] for entry in _load(run).get("files", []) if "commit" in entry}

    def prompts(source: str | None) -> str | None:
        data = parse(source)
        if not data or data.revision or source not in known:
            return source
        return data.model_copy(update={"revision": known[source]}).source()

    m, e = recipe.model, recipe.evaluate
    update: dict[str, Any] = {"prompts": prompts(recipe.prompts), "evaluate": e.model_copy(update={"prompts": prompts(e.prompts)})}
    if not m.revision and m.path in known:
        update["model"] = m.model_copy(update={"revision": known[m.path]})
    return recipe.model_copy(update=update)


def changes(recipe: Recipe, run: Path, begun: bool) -> list[str]:
    """What differs from what the run was made of, one phrase each. An override that names another file is no change.

    Args:
        recipe: as `found_again` returns it.
        begun: the run has a checkpoint, so that it does not read `ONCE` again.
    """
    named = _with_source_images(_named(recipe))
    found = []
    for entry in _load(run).get("files", []):
        key, path = entry["key"], _place(entry, run)
        if key == SOURCE_IMAGE and _beside(entry, run) in named[key]:
            path = _beside(entry, run)  # another image there is no other file: the prompt file means it
        if "sha256" not in entry or (begun and key in ONCE) or (key in named and path not in named[key]):
            continue
        now = _digest(key, path)
        if now != entry["sha256"]:
            found.append(f"{key} {shown(path)} {'is gone' if now is None else 'has changed'}")
    return found


def contents(recipe: Recipe) -> dict[str, str | None]:
    """The first digits of the SHA-256 of each file or folder that the recipe names; none where there is nothing."""
    return {
        f"the content of {key}{f' {number}' if number else ''}": found and found[:16]
        for key, paths in _named(recipe).items()
        for number, path in enumerate(paths)
        for found in [_digest(key, path)]
    }


def check(recipe: Recipe, run: Path, begun: bool) -> None:
    """Raises UserError where the run was made of something else; see `changes`."""
    if found := changes(recipe, run, begun):
        raise UserError(
            f"{run}: {'; '.join(found)} since the run began; put it back, or go on with it as it is now: --changed, in Python changed=True"
        )


def save(recipe: Recipe, run: Path, step: int | None, accepted: list[str]) -> None:
    """Writes sources.json.

    Args:
        step: of the checkpoint with which the run goes on, none at its beginning. What is read only once keeps its entry.
        accepted: changes with which the run goes on, which are noted.
    """
    old = _load(run)
    kept = [entry for entry in old.get("files", []) if step is not None and entry["key"] in ONCE]
    named = _with_source_images(_named(recipe))
    files = kept + [_entry(key, path, run) for key, paths in named.items() for path in paths if not (kept and key in ONCE)]
    places = [
        path for key, paths in named.items() if key.startswith("rewards.") or key in ("model.adapter", "objective.type") for path in paths
    ]
    files += [_entry("import", str(path), run) for path in neighbours(places)]
    if not os.path.isdir(recipe.model.path) and (commit := fingerprint(recipe.model.path, recipe.model.revision).get("commit")):
        files.append({"key": "model", "path": recipe.model.path, "commit": commit})
    begun = pinned(recipe, run)
    for key, source, now in (
        ("prompts", recipe.prompts, begun.prompts),
        ("evaluate.prompts", recipe.evaluate.prompts, begun.evaluate.prompts),
    ):
        if (data := parse(now)) and (commit := datasets.commit(data)):
            files.append({"key": key, "path": source, "commit": commit})
    noted = [*old.get("changed", []), *([{"step": step, "what": accepted}] if accepted else [])]
    write_json(RunFolder(run).sources, {"files": files} | ({"changed": noted} if noted else {}))


def _named(recipe: Recipe) -> dict[str, list[str]]:
    """The paths of each key."""
    found: dict[str, list[str]] = {}

    def note(key: str, path: str) -> str:
        found.setdefault(key, []).append(path)
        return path

    map_paths(recipe, note)
    return found


def _with_source_images(named: dict[str, list[str]]) -> dict[str, list[str]]:
    """The same, with the source images of the prompt files."""
    images: dict[str, None] = {}
    for path in (*named.get("prompts", ()), *named.get("evaluate.prompts", ())):
        with suppress(UserError):  # the file itself is gone, or can't be read any more
            if os.path.isfile(path):
                images |= {os.path.normpath(prompt.image): None for prompt in load_prompts(path, quiet=True) if prompt.image}
    return {**named, SOURCE_IMAGE: list(images)}


def _entry(key: str, path: str, run: Path) -> Entry:
    entry: Entry = {"key": key, "path": path}
    with suppress(ValueError):  # another drive
        entry["from_run"] = Path(os.path.relpath(path, run.resolve())).as_posix()
    if (sha256 := _digest(key, path)) is not None:
        entry["sha256"] = sha256
    return entry


def _place(entry: Mapping[str, Any], run: Path) -> str:
    """Where the file of an entry is now."""
    path, moved = entry["path"], _beside(entry, run)
    if not os.path.exists(path) and "sha256" in entry and _digest(entry["key"], moved) == entry["sha256"]:
        return moved
    return path


def _beside(entry: Mapping[str, Any], run: Path) -> str:
    """Where the file of an entry would be had it been moved with the run."""
    return os.path.normpath(run.resolve() / entry["from_run"]) if "from_run" in entry else entry["path"]


def _digest(key: str, path: str) -> str | None:
    """SHA-256 of a file, of a model folder, or of the LoRA at a place; none where there is nothing."""
    place = Path(path)
    with read_errors(place):
        if key in ONCE:
            try:
                return digest(find(place).weights)
            except UserError:
                return None
        if place.is_dir():
            return _folder_digest(place)
        if key == SOURCE_IMAGE and place.is_file():
            found = hashlib.sha256()
            _add_file(found, "", place)
            return found.hexdigest()
        return digest(place) if place.is_file() else None


def _folder_digest(folder: Path) -> str:
    found = hashlib.sha256()
    for file in sorted(folder.rglob("*")):
        name = file.relative_to(folder)
        if file.suffix not in _FOLDER_FILES or any(part.startswith(".") for part in name.parts) or not file.is_file():
            continue
        _add_file(found, name.as_posix(), file)
    return found.hexdigest()


def _add_file(found: Any, name: str, file: Path) -> None:
    """Adds a file to a hash: its name, its size, and its content or, of a large one, both ends of it."""
    size = file.stat().st_size
    found.update(f"{name}\0{size}\0".encode())
    with file.open("rb") as opened:
        if size > _WHOLE:
            found.update(opened.read(_ENDS))
            opened.seek(-_ENDS, os.SEEK_END)
        found.update(opened.read())


def _load(run: Path) -> dict[str, Any]:
    """sources.json; empty for a run of an earlier version."""
    place = RunFolder(run).sources
    try:
        with read_errors(place):
            found = json.loads(place.read_bytes()) if place.exists() else {}
        if all(isinstance(entry["key"], str) and isinstance(entry["path"], str) for entry in found.get("files", [])):
            return found
    except (ValueError, TypeError, KeyError, AttributeError):
        pass
    warnings.warn(f"{place}: damaged; whether prompts and reward files are the same is not known", stacklevel=2)
    return {}
