"""Checkpoints: folders of safetensors and JSON, whole or not there at all.

checkpoints/step-000100/ holds state.json (clocks, and the SHA-256 of every other file) and one
safetensors file for each LoRA role and for the optimizer. A folder appears by one rename; one whose
digests do not match is passed over for the one before it.
"""

import json
import shutil
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from flowtilt.errors import UserError
from flowtilt.files import digest, whole_folder, write_json

FORMAT = 3


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
    folder = run / "checkpoints" / f"step-{checkpoint.step:06d}"
    with whole_folder(folder) as temporary:
        for name, tensors in checkpoint.tensors.items():
            save_file({key: value.contiguous() for key, value in tensors.items()}, temporary / f"{name}.safetensors")
        digests = {file.name: digest(file) for file in sorted(temporary.glob("*.safetensors"))}
        write_json(temporary / "state.json", {"format": FORMAT, "step": checkpoint.step, "state": checkpoint.state, "sha256": digests})
    for old in _folders(run)[:-keep]:
        shutil.rmtree(old, ignore_errors=True)
    return folder


def newest(run: Path) -> Checkpoint | None:
    """The newest checkpoint that is whole, or none where none was ever written; warns of each torn one it passes over.

    Raises:
        UserError: there are checkpoints and none of them is whole.
    """
    folders = _folders(run)
    for folder in reversed(folders):
        try:
            return _read(folder)
        except Exception as error:  # whatever a torn file makes a parser raise
            warnings.warn(f"checkpoint {folder.name} is damaged ({error}); going on from the one before", stacklevel=2)
    if folders:
        raise UserError(f"{run}: none of its {len(folders)} checkpoints can be read; restore one, or start a new run")
    return None


def _folders(run: Path) -> list[Path]:
    return sorted(path for path in (run / "checkpoints").glob("step-*") if path.is_dir())


def _read(folder: Path) -> Checkpoint:
    record = json.loads((folder / "state.json").read_text())
    if record["format"] != FORMAT:
        raise ValueError(f"format {record['format']}, this version reads {FORMAT}")
    for name, expected in record["sha256"].items():
        if digest(folder / name) != expected:
            raise ValueError(f"{name} is not what was written")
    tensors = {Path(name).stem: load_file(folder / name) for name in record["sha256"]}
    return Checkpoint(record["step"], record["state"], tensors)


def optimizer_tensors(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """The optimizer's averages and counters as flat tensors, "index.name"."""
    state = optimizer.state_dict()["state"]
    return {f"{index}.{name}": value.detach().cpu() for index, values in state.items() for name, value in values.items()}


def load_optimizer(optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor]) -> None:
    """Puts back what `optimizer_tensors` took."""
    state: dict[int, dict[str, Tensor]] = {}
    for key, value in tensors.items():
        index, _, name = key.partition(".")
        state.setdefault(int(index), {})[name] = value
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
