"""A LoRA in ComfyUI's keys: the model's original names behind "diffusion_model.", with an alpha beside each layer."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from flowtilt.errors import UserError
from flowtilt.io.tensors import save_file
from flowtilt.lora import Lora, baked, parents_metadata
from flowtilt.lora.find import COMFYUI
from flowtilt.lora.names import Pair, swapped
from flowtilt.lora.original import BY_NETWORK, Naming

FOURFOLD = "proj_mlp"
"""A part of a joint layer with four times the rows of the others."""


def to_comfyui(lora: Lora, folder: Path, network: str, shapes: Mapping[str, Sequence[int]] | None = None) -> None:
    """Writes comfyui_lora.safetensors with alpha = rank, the scale being in B.

    Layers that are one in the original, such as queries, keys and values, become one: their own A one below another and
    their B along the diagonal, or, where all have the same A, as in a file that was one before, that A once.

    Args:
        network: the class of the base's network in diffusers.
        shapes: [out, in] of its layers, where they are known.

    Raises:
        UserError: no names are known for that network, or for one of the layers.
    """
    naming = BY_NETWORK.get(network)
    if naming is None:
        raise UserError(f"export: ComfyUI's names for a {network} are not known here; ComfyUI reads --to diffusers for many models")
    tensors: dict[str, Tensor] = {}
    for name, (a, b) in originals(baked(lora), naming, shapes or {}).items():
        tensors |= {f"diffusion_model.{name}.{end}": x for end, x in (("lora_A.weight", a), ("lora_B.weight", b))}
        tensors[f"diffusion_model.{name}.alpha"] = torch.tensor(float(len(a)))
    save_file(tensors, folder / COMFYUI, {"format": "pt"} | parents_metadata(lora.parents))


def originals(lora: Lora, naming: Naming, shapes: Mapping[str, Sequence[int]]) -> dict[str, Pair]:
    """A [r, in] and B [out, r], of scale 1, by the original names, of a LoRA whose alphas are its ranks."""
    inside = {
        (own, new): (f"{kind}.{{}}.{old}", layers)
        for kind, (own, table) in naming.blocks.items()
        for old, layers in table.items()
        for new in layers
    }
    outside = {new: old for old, new in naming.elsewhere.items()}
    found: dict[str, Pair] = {}
    for layer, (a, b) in lora.layers.items():
        block = re.fullmatch(r"(\w+)\.(\d+)\.(.+)", layer)
        if block and (at := inside.get((block[1], block[3]))):
            name, members = at[0].format(block[2]), [f"{block[1]}.{block[2]}.{new}" for new in at[1]]
            if name not in found:
                found[name] = (a, swapped(layer, a, b)) if len(members) == 1 else _joined(lora, members, shapes, naming.grouped)
        elif layer in outside:
            found[outside[layer]] = (a, swapped(layer, a, b))
        else:
            raise UserError(f"lora {lora.source}: {layer} has no name in ComfyUI that is known here; export --to diffusers")
    return found


def _joined(lora: Lora, members: Sequence[str], shapes: Mapping[str, Sequence[int]], grouped: bool) -> Pair:
    pairs = [lora.layers.get(name) for name in members]
    there = [pair for pair in pairs if pair]
    first = there[0][0]
    if len(there) == len(pairs) and all(torch.equal(a, first) for a, _ in there):
        return first.clone(), torch.cat([b for _, b in there])
    width, rank = first.shape[1], max(len(a) for a, _ in there)
    rows = []
    for name, pair in zip(members, pairs, strict=True):
        if not pair and name not in shapes and grouped:
            raise UserError(f"lora {lora.source}: has no {name}, whose size is needed; give the base as a folder with --model")
        assumed = 4 * width if name.endswith(FOURFOLD) else width
        rows.append(len(pair[1]) if pair else int(shapes[name][0]) if name in shapes else assumed)
    a, b = torch.zeros(len(pairs) * rank, width), torch.zeros(sum(rows), len(pairs) * rank)
    for k, pair in enumerate(pairs):
        if pair:
            column, row = k * rank, sum(rows[:k])
            a[column : column + len(pair[0])] = pair[0]
            b[row : row + rows[k], column : column + len(pair[0])] = pair[1]
    return a, b
