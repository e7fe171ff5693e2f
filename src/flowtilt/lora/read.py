"""Reading LoRAs: files of diffusers, PEFT, kohya, ComfyUI and ai-toolkit, flat state dicts as RTDMD's, and our own checkpoints.

Tensor names tell the layers, so one reader serves all. What differs is who knows alpha: a header or a tensor beside
the layer; PEFT's adapter_config.json; a checkpoint's run in its recipe; else diffusers and other tools take the rank, and
a flat state dict must be told. The same places, but a checkpoint's state.json for the recipe, say which LoRAs lie beneath
one that we trained.
"""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from flowtilt.config import load_recipe
from flowtilt.errors import UserError
from flowtilt.io import weights
from flowtilt.io.notices import notice
from flowtilt.io.run_folder import CheckpointFolder, RunFolder
from flowtilt.io.user_errors import first_line
from flowtilt.lora import PARENTS, Lora
from flowtilt.lora.alpha import by_config, in_header, number, read_config
from flowtilt.lora.find import Found, find
from flowtilt.lora.names import UNDERSCORED, naming_of, own_name, to_diffusers

NAME = re.compile(r"(?P<layer>.+)\.(?:lora_(?P<side>[AB])(?:\.(?P<adapter>[^.]+))?|lora[._](?P<old>down|up))\.weight")
"""PEFT's names, with or without the adapter's; diffusers' older ones; kohya's."""
RANK_MEANT = ("transformer.", "diffusion_model.", "model.diffusion_model.", *UNDERSCORED)
"""Beginnings of names of tools that take the rank for alpha where nothing tells it: diffusers, ComfyUI, ai-toolkit, kohya."""
TEXT_ENCODERS = ("text_encoder", "lora_te", "lora_t5", "text_model", "clip_l", "clip_g", "t5xxl")
"""Beginnings of text encoders' layers in various tools' files."""
OTHERS = {
    "lokr_": "a LoKr of LyCORIS",
    "hada_": "a LoHa of LyCORIS",
    "oft_": "an OFT adapter",
    "dora_scale": "a DoRA",
    "lora_magnitude_vector": "a DoRA",
    "_lora.down": "a LoRA of an early diffusers, for its attention processors",
}
"""What a tensor's name says of a file without LoRA pairs."""
LARGEST = 3e38
"""Near the largest fp32 number: an update beyond it would be infinite."""


def read_lora(place: Path | str) -> Lora:
    """The LoRA of a run (its newest EMA), a checkpoint, a folder or a file; "PATH@64" says or overrules alpha.

    Raises:
        UserError: there is none, it is damaged or incomplete, it is more than a LoRA, or nothing tells its alpha.
    """
    found = find(place)
    file = found.weights
    tensors, metadata = _load(file)
    pairs, beside = _sort(file, tensors)
    if not pairs:
        raise UserError(f"lora {file}: {_instead(tensors)}; LoRA weights have names such as transformer_blocks.0.attn.to_q.lora_A.weight")
    named = {layer: _pair(file, layer, sides) for layer, sides in pairs.items()}
    alphas = _alphas(found, {layer: len(a) for layer, (a, _) in named.items()}, metadata, beside, any(map(_means_rank, tensors)))
    _check_size(file, named, alphas)
    layers: dict[str, tuple[Tensor, Tensor]] = {}
    own_alphas: dict[str, float] = {}
    naming = naming_of(named)
    for layer, (a, b) in named.items():
        own = to_diffusers(layer, a, b, naming)
        if own is None:
            raise UserError(
                f"lora {file}: {layer} [{len(b)}, {a.shape[1]}] is named as another tool names layers, but is none of a model "
                "whose names are known here; convert the file to diffusers' format"
            )
        if twice := own.keys() & layers.keys():
            raise UserError(f"lora {file}: holds {min(twice)} twice, under names of two tools")
        layers |= own
        own_alphas |= {name: alphas[layer] * len(part) / len(a) for name, (part, _) in own.items()}
    return Lora(layers, own_alphas, str(file), _parents(found, metadata))


def _load(file: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors by their names in the file, and a safetensors file's metadata."""
    if file.suffix != ".safetensors":
        found = weights.read(file)
        return {name: _dense(file, _text(file, name), value) for name, value in found.items()}, {}
    try:
        with safe_open(file, "pt") as opened:
            tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118 - not a dict
            metadata = opened.metadata() or {}
    except Exception as error:  # of a damaged header, or of a type that torch does not have
        kind = f"{first_line(error)}" if isinstance(error, SafetensorError | OSError) else f"{type(error).__name__}: {first_line(error)}"
        raise UserError(f"lora {file}: not a readable safetensors file ({kind})") from None
    return {name: _dense(file, name, value) for name, value in tensors.items()}, metadata


def _text(file: Path, name: object) -> str:
    if not isinstance(name, str):
        raise UserError(f"lora {file}: holds {name!r:.40} instead of a tensor's name")
    return name


def _dense(file: Path, name: str, value: object) -> Tensor:
    """A tensor whose numbers are all in the file."""
    if not isinstance(value, Tensor):
        raise UserError(f"lora {file}: holds {name:.80}, a {type(value).__name__}, instead of named tensors alone")
    odd = (
        "on no device" if value.is_meta
        else "sparse" if value.layout != torch.strided
        else "nested" if value.is_nested
        else "quantized" if value.is_quantized
        else "complex" if value.is_complex()
        else "larger than its storage" if value.untyped_storage().nbytes() < value.numel() * value.element_size()
        else ""
    )  # fmt: skip
    if odd:
        raise UserError(f"lora {file}: {name:.80} is {odd}; LoRA weights are plain tensors of real numbers")
    return value.detach()


def _sort(file: Path, tensors: Mapping[str, Tensor]) -> tuple[dict[str, dict[str, Tensor]], dict[str, float]]:
    """Layer -> {"A": …, "B": …} and layer -> alpha, from the tensors' names."""
    pairs: dict[str, dict[str, Tensor]] = {}
    alphas: dict[str, float] = {}
    adapters: set[str] = set()
    seen: set[tuple[str, str, str | None]] = set()
    beyond = []
    texts: set[str] = set()
    for key, value in tensors.items():
        name = own_name(key)
        if name.startswith(TEXT_ENCODERS):
            texts.add(re.split(r"\.(?:lora|alpha|dora|hada|lokr|oft)", name)[0])
            continue
        match = NAME.fullmatch(name)
        if match:
            side = match["side"] or {"down": "A", "up": "B"}[match["old"]]
            adapters.add(match["adapter"] or "")
            if (match["layer"], side, match["adapter"]) in seen:
                raise UserError(f"lora {file}: holds lora_{side} of {match['layer']} twice, under two names")
            seen.add((match["layer"], side, match["adapter"]))
            pairs.setdefault(match["layer"], {})[side] = value
        elif name.endswith(".alpha") and value.numel() == 1:
            layer = name.removesuffix(".alpha")
            alphas[layer] = number(file, layer, value.item())
        else:
            beyond.append(key)
    if texts and not pairs:
        raise UserError(f"lora {file}: changes only text encoders ({min(texts)}), which is not supported: only the network's layers can be")
    if texts:
        notice(
            f"lora {file}: its {len(texts)} layers of text encoders are left out, {min(texts)} first; the network's {len(pairs)} are used"
        )
    if pairs and beyond:
        raise UserError(
            f"lora {file}: also holds {min(beyond)}; an adapter with biases, DoRA's magnitudes or whole weights can't be added to a base"
        )
    if len(adapters) > 1:
        names = ", ".join(sorted(name or "one without a name" for name in adapters))
        raise UserError(f"lora {file}: holds several adapters ({names}); save the one that is meant")
    return pairs, alphas


def _instead(tensors: Mapping[str, Tensor]) -> str:
    """What a file without pairs is."""
    for part, kind in OTHERS.items():
        if name := next((name for name in tensors if part in name), None):
            return f"{kind} ({name}), which is not supported"
    return f"holds {len(tensors)} tensors, {min(tensors)} first" if tensors else "holds nothing"


def _pair(file: Path, layer: str, sides: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
    if len(sides) != 2:
        there, lacking = ("A", "B") if "A" in sides else ("B", "A")
        raise UserError(f"lora {file}: {layer} has lora_{there} and no lora_{lacking}; the file is incomplete")
    a, b = sides["A"], sides["B"]
    if a.ndim != 2 or b.ndim != 2 or a.shape[0] != b.shape[1] or not a.numel() or not b.numel():
        raise UserError(f"lora {file}: lora_A {list(a.shape)} and lora_B {list(b.shape)} of {layer} are no [r, in] and [out, r]")
    for side, x in (("A", a), ("B", b)):
        if not x.is_floating_point():
            raise UserError(
                f"lora {file}: lora_{side} of {layer} holds {str(x.dtype).removeprefix('torch.')}; weights are floating-point numbers"
            )
    return a.to(torch.float32).contiguous(), b.to(torch.float32).contiguous()


def _check_size(file: Path, layers: Mapping[str, tuple[Tensor, Tensor]], alphas: Mapping[str, float]) -> None:
    """Raises UserError where an update is not finite."""
    for layer, (a, b) in layers.items():
        largest = [float(x.abs().max()) for x in (a, b)]  # NaN and infinity come through
        if largest[0] * largest[1] * abs(alphas[layer]) < LARGEST:  # each product of r terms, times alpha / r
            continue
        for side, x in (("A", a), ("B", b)):
            if broken := int((~x.isfinite()).sum()):
                raise UserError(
                    f"lora {file}: lora_{side} of {layer} has {broken} of {x.numel()} values NaN or infinite; the file is broken"
                )
        raise UserError(f"lora {file}: the update of {layer} overflows, with an alpha of {alphas[layer]:g}")


def _means_rank(name: str) -> bool:
    return name.startswith(RANK_MEANT) or ".lora_down." in name


def _alphas(
    found: Found, ranks: Mapping[str, int], metadata: Mapping[str, str], beside: Mapping[str, float], means_rank: bool
) -> dict[str, float]:
    """Alpha of each layer: what the user says, else what the file's own format says.

    Args:
        beside: alphas in tensors beside their layers.
        means_rank: a file of a tool that takes the rank where nothing else is told.
    """
    if found.alpha is not None:
        return dict.fromkeys(ranks, found.alpha)
    file = found.weights
    if config := in_header(file, metadata):
        told = by_config(file, config, ranks)
        if other := next((layer for layer in ranks if beside.get(layer, told[layer]) != told[layer]), None):
            raise UserError(
                f"lora {file}: its header has {told[other]:g} as alpha of {other}, the tensor beside that layer {beside[other]:g}; "
                f"write {file}@ALPHA with what is right"
            )
        return told
    if means_rank:
        return {layer: beside.get(layer, float(rank)) for layer, rank in ranks.items()}
    if found.config:
        return by_config(found.config, read_config(found.config), ranks)
    if found.run:
        return dict.fromkeys(ranks, load_recipe(RunFolder(found.run).recipe, stored=True).lora.alpha)
    if ranks.keys() <= beside.keys():
        return {layer: beside[layer] for layer in ranks}
    raise UserError(
        f"lora {file}: its format does not tell alpha; write {file}@ALPHA, RTDMD's being 64 for its rank 32, "
        "or put its adapter_config.json beside it"
    )


def _parents(found: Found, metadata: Mapping[str, str]) -> tuple[str, ...]:
    """Fingerprints of what lies beneath: as the file has them, else the configuration beside it, else its checkpoint."""
    told: Any = []
    if found.run:
        state = read_config(CheckpointFolder(found.weights.parent).state).get("state", {})
        told = state.get("parents", []) if isinstance(state, dict) else state
    else:
        text = (read_config(found.config) if found.config and PARENTS not in metadata else metadata).get(PARENTS, "[]")
        try:
            told = json.loads(text)
        except (ValueError, TypeError, RecursionError):
            told = text
    if not isinstance(told, list) or not all(isinstance(one, str) and re.fullmatch("[0-9a-f]{64}", one) for one in told):
        raise UserError(f"lora {found.weights}: its list of base LoRAs is damaged: {told!r:.80}")
    return tuple(told)
