"""Checkpoints: folders of safetensors and JSON, whole or not there at all.

checkpoints/step-000100/ holds state.json (clocks, the SHA-256 of every other file, and its own) and one
safetensors file for each LoRA role and for the optimizer. A folder appears by one rename; one whose
digests do not match is set aside for the one before it. Other names in checkpoints/ are the user's.
"""

import hashlib
import json
import shutil
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from flowtilt.errors import UserError
from flowtilt.io.files import digest, read_errors, set_aside, whole_folder, write_json
from flowtilt.io.run_folder import CheckpointFolder, RunFolder, step_of
from flowtilt.io.tensors import save_file

FORMAT = 4
OLDEST = 3
"""That of flowtilt 0.1.0: its state.json has no checksum and no "method"."""


@dataclass(frozen=True)
class Checkpoint:
    """Everything that decides the next step.

    Args:
        step: rollouts done.
        state: clocks and counters, JSON.
        tensors: file name without ending -> tensors by name.
    """

    step: int
    state: dict[str, Any]
    tensors: dict[str, dict[str, Tensor]]


def save(run: Path, checkpoint: Checkpoint, keep: int) -> Path:
    """Writes a checkpoint and then removes all but the newest `keep`; returns its folder.

    Raises:
        UserError: no space left; the older checkpoints are untouched.
    """
    folder = RunFolder(run).checkpoint(checkpoint.step).path
    with whole_folder(folder) as temporary:
        for name, tensors in checkpoint.tensors.items():
            save_file({key: value.contiguous() for key, value in tensors.items()}, temporary / f"{name}.safetensors")
        digests = {file.name: digest(file) for file in sorted(temporary.glob("*.safetensors"))}
        record = {"format": FORMAT, "step": checkpoint.step, "state": checkpoint.state, "sha256": digests}
        write_json(CheckpointFolder(temporary).state, {**record, "own_sha256": _checksum(record)})
    prune(run, keep)
    return folder


def prune(run: Path, keep: int) -> None:
    """Removes all checkpoints but the newest `keep`."""
    for _, old in numbered(RunFolder(run).checkpoints)[:-keep]:
        shutil.rmtree(old, ignore_errors=True)


def newest(run: Path) -> Checkpoint | None:
    """The newest checkpoint that is whole, or none where none was ever written; warns of each damaged one and sets it aside.

    Raises:
        UserError: there are checkpoints and none of them is whole, or one can't be read, which says nothing of its content.
    """
    folders = [folder for _, folder in numbered(RunFolder(run).checkpoints)]
    damaged: list[tuple[Path, Exception]] = []
    for folder in reversed(folders):
        try:
            found = _read(folder)
        except (UserError, MemoryError):
            raise
        except Exception as error:  # whatever a torn file makes a parser raise
            damaged.append((folder, error))
            continue
        for other, error in damaged:
            aside = set_aside(other)
            warnings.warn(
                f"checkpoint {other.name} is damaged ({error}) and is now {aside.name}; going on from the one before", stacklevel=2
            )
        return found
    if damaged:
        folder, error = damaged[0]
        raise UserError(f"{run}: none of its {len(damaged)} checkpoints is whole ({folder.name}: {error}); restore one, or start a new run")
    return None


def at(run: Path, step: int) -> Checkpoint:
    """The checkpoint after `step` rollouts, which `newest` has found to be whole."""
    return _read(RunFolder(run).checkpoint(step).path)


def numbered(folder: Path) -> list[tuple[int, Path]]:
    """The folders that flowtilt has made for single steps in `folder`, by step; [] where there is no such folder.

    Raises:
        UserError: it can't be read.
    """
    with read_errors(folder):
        try:
            places = list(folder.iterdir())
        except FileNotFoundError:
            return []
        found = [(step_of(place.name), place) for place in places if place.is_dir() and not place.is_symlink()]
    return sorted((number, place) for number, place in found if number is not None)


def _read(folder: Path) -> Checkpoint:
    """A checkpoint; raises UserError where a file can't be read, and other errors where it is damaged."""
    with read_errors(folder):
        try:
            record = json.loads((CheckpointFolder(folder).state).read_bytes().decode())
            _check(record, folder)
            for name, expected in record["sha256"].items():
                if digest(folder / name) != expected:
                    raise ValueError(f"{name} is not what was written")
            tensors = {Path(name).stem: load_file(folder / name) for name in record["sha256"]}
        except (FileNotFoundError, NotADirectoryError, IsADirectoryError) as error:
            raise ValueError(f"{Path(error.filename or folder).name} is missing") from error
    if record["step"] != step_of(folder.name):
        raise ValueError(f"it is a copy of the one of step {record['step']}")
    return Checkpoint(record["step"], {"method": {}, **record["state"]}, tensors)


def _check(record: dict[str, Any], folder: Path) -> None:
    """Raises UserError where a state.json is of another version, and ValueError where it is damaged."""
    found = record["format"]
    if not isinstance(found, int) or isinstance(found, bool):
        raise ValueError(f"format {found!r:.40}")
    if found > FORMAT:
        raise UserError(
            f"{folder}: is of a later flowtilt (format {found}, this one reads up to {FORMAT}); upgrade it: pip install -U flowtilt"
        )
    if found < OLDEST:
        raise UserError(f"{folder}: is of a flowtilt before 0.1.0 (format {found}); begin a new run with lora.init={folder.parent.parent}")
    if found > OLDEST and record.pop("own_sha256") != _checksum(record):
        raise ValueError("state.json is not what was written")


def _checksum(record: Mapping[str, Any]) -> str:
    """SHA-256 of JSON, whatever its white space and the order of its keys."""
    return hashlib.sha256(json.dumps(record, sort_keys=True).encode()).hexdigest()


def optimizer_tensors(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """The optimizer's averages and counters as flat tensors, "index.name"."""
    state = optimizer.state_dict()["state"]
    return {f"{index}.{name}": value.detach() for index, values in state.items() for name, value in values.items()}


def load_optimizer(optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor]) -> None:
    """Puts back what `optimizer_tensors` took."""
    state: dict[int, dict[str, Tensor]] = {}
    for key, value in tensors.items():
        index, _, name = key.partition(".")
        state.setdefault(int(index), {})[name] = value
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
