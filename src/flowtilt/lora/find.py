"""What a `--lora` means: a run, one of its checkpoints, a folder of diffusers, PEFT or RTDMD, or a file, each also as PATH@ALPHA."""

import math
import re
from dataclasses import dataclass
from pathlib import Path

from flowtilt.errors import UserError
from flowtilt.io.hub import is_hub_id, lora_file
from flowtilt.io.run_folder import CheckpointFolder, RunFolder

CONFIG = "adapter_config.json"
COMFYUI = "comfyui_lora.safetensors"
"""What an export for ComfyUI is called."""
FILES = (
    "pytorch_lora_weights.safetensors",
    "adapter_model.safetensors",
    "adapter_model.bin",
    "generator_ema.pt",
    "generator.pt",
    CheckpointFolder.ema,
    COMFYUI,
)
"""Names of weights files, in the order in which they are looked for: diffusers', PEFT's, RTDMD's, our checkpoints', ComfyUI's."""
FOLDERS = ("", RunFolder.lora, "transformer")
"""Where they lie in a place: a run of ours and Flow-GRPO's checkpoints have lora/, RTDMD's checkpoints transformer/."""


@dataclass(frozen=True)
class Found:
    """A LoRA's files.

    Args:
        weights: the tensors.
        alpha: as PATH@ALPHA says, or none.
        config: the PEFT configuration beside the weights, or none.
        run: the run of which the weights are a checkpoint, or none.
    """

    weights: Path
    alpha: float | None
    config: Path | None
    run: Path | None


def split_alpha(place: Path | str) -> tuple[Path, float | None]:
    """PATH@ALPHA as its parts, PATH also being a hub id with or without a commit; a path that exists is never split.

    Raises:
        UserError: what follows the @ is neither a positive number nor a hub id's commit, and what precedes it exists.
    """
    text = str(place)
    before, at, after = text.rpartition("@")
    if not at or Path(text).exists() or _of_hub(text)[1] or not (Path(before).exists() or _of_hub(before)[0]):
        return Path(text), None
    try:
        alpha = float(after)
    except ValueError:
        alpha = math.nan
    if not 0 < alpha < math.inf:
        commit = "" if Path(before).exists() else ", or a commit's 40 hexadecimal digits"
        raise UserError(f"lora {text}: what follows the @ is alpha, a positive number such as 64{commit}, not {after!r}")
    return Path(before), alpha


def _of_hub(text: str) -> tuple[str | None, str | None]:
    """A hub id, or a folder or file of it, and the commit that follows its @; none is the newest, and twice none is no hub id."""
    name, _, commit = text.partition("@")
    if not is_hub_id(name) or (commit and not re.fullmatch("[0-9a-f]{40}", commit)):
        return None, None
    return name, commit or None


def find(place: Path | str) -> Found:
    """The files of a place; those of a hub id, "owner/name" or a folder of it, are fetched.

    Raises:
        UserError: there is no LoRA.
    """
    path, alpha = split_alpha(place)
    name, commit = (None, None) if path.exists() else _of_hub(str(path))
    if name:
        files = [file for file in FILES if file != CheckpointFolder.ema]
        weights = lora_file(name, files, FOLDERS, (CONFIG, f"transformer/{CONFIG}"), commit)
    else:
        weights = path if path.is_file() else _inside(path)
    beside = (weights.parent / CONFIG, weights.parent / "transformer" / CONFIG)
    return Found(weights, alpha, next((file for file in beside if file.is_file()), None), run_of_checkpoint(weights.parent))


def run_of_checkpoint(folder: Path) -> Path | None:
    """The run that a folder is a checkpoint of, or none."""
    run = RunFolder.around(folder)
    return run.path if run and CheckpointFolder(folder).state.is_file() else None


def run_of(place: Path | str) -> Path | None:
    """The run that a LoRA lies in, or none."""
    path = split_alpha(place)[0].resolve()
    run = run_of_checkpoint(path.parent if path.is_file() else path)
    around = (run,) if run else (path, *path.parents[:2])
    return next((folder for folder in around if RunFolder(folder).is_run()), None)


def _inside(path: Path) -> Path:
    if (path / "model_index.json").is_file():
        raise UserError(f"lora {path}: this is a whole pipeline; give it as --model")
    if (path / "transformer" / "diffusion_pytorch_model.safetensors").is_file():
        raise UserError(f'lora {path}: a run of train = "full" has all weights and no LoRA; export it, and give that as the model')
    if file := first_in(path):
        return file
    if path.is_dir():
        inner = [folder for folder in _folders(path) if first_in(folder)]
        where = f"; {' and '.join(map(str, inner[:4]))} have one" if len(inner) > 1 else f"; {inner[0]} has one" if inner else ""
        rather = "give a run, a checkpoint, a folder of diffusers or PEFT, or the file itself"
        raise UserError(f"lora {path}: no LoRA there{where or f'; {rather}'}")
    raise UserError(f"lora {path}: no such file or folder")


def _folders(path: Path) -> list[Path]:
    """The folders in a folder, to two levels: a repository's may have one for each stage, with one for each checkpoint."""
    return [folder for pattern in ("*", "*/*") for folder in sorted(path.glob(pattern)) if folder.is_dir()]


def first_in(path: Path) -> Path | None:
    """The weights file of a folder, or none."""
    return next((file for file in (path / folder / name for folder in FOLDERS for name in FILES) if file.is_file()), None)
