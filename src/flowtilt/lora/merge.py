"""A pipeline on disk with LoRAs merged into its network. Only the network's files are rewritten; all others are copied as they are."""

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline
from safetensors import SafetensorError, safe_open
from torch import Tensor

from flowtilt.errors import UserError
from flowtilt.io import hub
from flowtilt.io.tensors import save_file
from flowtilt.io.user_errors import first_line
from flowtilt.lora import Lora
from flowtilt.lora.fit import check
from flowtilt.models.opening import folder_of

NETWORK = "transformer"
"""The folder of the network in a pipeline's."""


def local_folder(path: str) -> Path | None:
    """The folder of a model that needs no download, or none."""
    place = Path(folder_of(path))
    return place if place.is_dir() else None


def pipeline_folder(path: str, revision: str | None) -> Path:
    """The folder of a model, downloaded where it is a hub id that is not in the cache.

    Raises:
        UserError: it can't be had.
    """
    folder = local_folder(path)
    if folder:
        return folder
    try:
        return hub.pipeline_folder(path, revision)
    except UserError:
        raise
    except Exception as error:  # the hub and the disk each raise their own
        raise UserError(f"model {path}: neither a folder nor to be had from the hub: {first_line(error)}") from error


def network_class(path: str, revision: str | None) -> str:
    """The class of a pipeline's network in diffusers, from its index, which alone is downloaded where it is not in the cache.

    Raises:
        UserError: it can't be had.
    """
    try:
        index: Any = DiffusionPipeline.load_config(folder_of(path), revision=revision)
        return str(index[NETWORK][1])
    except Exception as error:  # the hub, the disk, or an index without such a network
        raise UserError(f"model {path}: its model_index.json does not tell its {NETWORK}: {first_line(error)}") from error


def shapes_in(folder: Path) -> dict[str, tuple[int, ...]]:
    """[out, in] of each layer of a pipeline's network, from the headers of its files.

    Raises:
        UserError: it has no safetensors files, or a damaged one.
    """
    shapes = {}
    for file in _files(folder):
        with _opened(file) as opened:
            for name in opened.keys():  # noqa: SIM118 - not a dict
                shape = tuple(opened.get_slice(name).get_shape())
                if name.endswith(".weight") and len(shape) == 2:
                    shapes[name.removesuffix(".weight")] = shape
    return shapes


def to_pipeline(loras: Sequence[Lora], base: Path, folder: Path) -> None:
    """Writes `base` with W + scale B A, added up in fp32 in the order of the LoRAs and rounded once to the dtype that W is stored in.

    Raises:
        UserError: a LoRA does not fit, or the base is no pipeline with safetensors weights.
    """
    shapes = shapes_in(base)
    for lora in loras:
        check(lora, shapes)
    copy_parts(base, folder, network=("*.safetensors", "*.bin", "*.bin.index.json"))
    for file in _files(base):
        with _opened(file) as opened:
            metadata, tensors = opened.metadata(), {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118 - not a dict
        save_file({name: _merged(name, weight, loras) for name, weight in tensors.items()}, folder / NETWORK / file.name, metadata)


def copy_parts(base: Path, folder: Path, network: Sequence[str]) -> None:
    """Copies a pipeline's index, components and licence, of its network all files but those that `network`'s patterns match."""
    components = [name for name in json.loads((base / "model_index.json").read_text(encoding="utf-8")) if (base / name).is_dir()]
    for name in components:
        shutil.copytree(base / name, folder / name, ignore=shutil.ignore_patterns(*network) if name == NETWORK else None)
    for file in (base / "model_index.json", *base.glob("LICENSE*")):
        shutil.copy(file, folder / file.name)


def tensors_in(folder: Path) -> dict[str, Tensor]:
    """All tensors of a pipeline's network by name.

    Raises:
        UserError: it has no safetensors files, or a damaged one.
    """
    found = {}
    for file in _files(folder):
        with _opened(file) as opened:
            found |= {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118 - not a dict
    return found


def _merged(name: str, weight: Tensor, loras: Sequence[Lora]) -> Tensor:
    layer = name.removesuffix(".weight")
    having = [lora for lora in loras if layer in lora.layers and name.endswith(".weight")]
    merged = weight.to(torch.float32) if having else weight
    for lora in having:
        a, b = lora.layers[layer]
        merged = torch.addmm(merged, b, a, alpha=lora.scale(layer))
    return merged.to(weight.dtype)


def _files(folder: Path) -> list[Path]:
    found = sorted((folder / NETWORK).glob("*.safetensors"))
    if not found or not (folder / "model_index.json").is_file():
        raise UserError(f"model {folder}: no pipeline with {NETWORK}/*.safetensors; give the folder that save_pretrained wrote")
    return found


def _opened(file: Path) -> Any:
    try:
        return safe_open(file, "pt")
    except (SafetensorError, OSError) as error:
        raise UserError(f"model {file}: not a readable safetensors file ({error})") from None
