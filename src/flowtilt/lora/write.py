"""Writing a LoRA for others: diffusers' file, a PEFT folder, RTDMD's flat state dict.

ComfyUI, `load_lora_weights(state_dict)` and others do not read the alpha that diffusers and PEFT write, and take the rank. So
alpha is the rank in what is written, and the scale is in B; RTDMD's own settings have alpha = 2 x rank. The fingerprints of what
lies beneath stand under a key that others pass over.
"""

import json
import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import StableDiffusion3Pipeline
from peft import LoraConfig
from safetensors import safe_open
from safetensors.torch import load

from flowtilt.errors import UserError
from flowtilt.io.tensors import save_file, settle
from flowtilt.lora import Lora, baked, parents_metadata
from flowtilt.lora.find import CONFIG

DIFFUSERS = "pytorch_lora_weights.safetensors"
"""The name that diffusers gives its file."""
RTDMD_RATIO = 2.0
"""Alpha / rank in RTDMD's settings."""


def peft_config(lora: Lora, base: str | None = None) -> LoraConfig:
    """PEFT's description: the commonest rank and alpha, and patterns for layers with others."""
    ranks = {layer: lora.rank(layer) for layer in lora.layers}
    rank, alpha = Counter(ranks.values()).most_common(1)[0][0], Counter(lora.alphas.values()).most_common(1)[0][0]
    settings: dict[str, Any] = {  # PEFT types alpha as an int and computes with any number
        "r": rank,
        "lora_alpha": _short(alpha),
        "rank_pattern": {_pattern(layer): own for layer, own in ranks.items() if own != rank},
        "alpha_pattern": {_pattern(layer): _short(own) for layer, own in lora.alphas.items() if own != alpha},
        "base_model_name_or_path": base,
    }
    return LoraConfig(**settings, target_modules=list(lora.layers), inference_mode=True)


def to_diffusers(lora: Lora, folder: Path) -> None:
    """Writes pytorch_lora_weights.safetensors, alpha = rank, for `pipeline.load_lora_weights` and whatever reads diffusers' files."""
    lora = baked(lora)
    config = {key: sorted(v) if isinstance(v, set) else v for key, v in peft_config(lora).to_dict().items()}
    layers: dict[str, Any] = dict(_named(lora, "{}.lora_{}.weight"))
    # of every pipeline whose network is its `transformer`, the file is the same
    StableDiffusion3Pipeline.save_lora_weights(str(folder), transformer_lora_layers=layers, transformer_lora_adapter_metadata=config)
    settle(folder / DIFFUSERS)
    add_parents(folder / DIFFUSERS, lora.parents)


def add_parents(file: Path, parents: Sequence[str]) -> None:
    """Adds the fingerprints of what lies beneath a LoRA to its safetensors file; without any the file stays as it is."""
    if parents:
        with safe_open(file, "pt") as opened:
            metadata = opened.metadata() or {}
        # from bytes: tensors that `safe_open` gives still map the file that is written over
        save_file(load(file.read_bytes()), file, metadata | parents_metadata(parents))


def to_peft(lora: Lora, folder: Path, base: str | None = None) -> None:
    """Writes adapter_config.json and adapter_model.safetensors for `PeftModel.from_pretrained(pipeline.transformer, folder)`; alpha = rank.

    Args:
        base: the model's hub id or folder, which the configuration names.
    """
    lora = baked(lora)
    _save_config(lora, folder, base)
    save_file(
        _named(lora, "base_model.model.{}.lora_{}.weight"),
        folder / "adapter_model.safetensors",
        {"format": "pt"} | parents_metadata(lora.parents),
    )


def to_generator_ema(lora: Lora, folder: Path, base: str | None = None) -> None:
    """Writes generator_ema.pt, RTDMD's flat state dict, and beside it an adapter_config.json, since that tells neither alpha nor parents.

    Alpha is 2 x rank, as RTDMD's 64 of rank 32.

    Raises:
        UserError: its layers differ in rank; RTDMD reads one from its own settings.
    """
    if len(lora.ranks()) > 1:
        raise UserError(f"lora {lora.source}: its layers differ in rank, and generator_ema.pt has one rank; choose --to peft")
    lora = baked(lora, RTDMD_RATIO)
    _save_config(lora, folder, base)
    config = folder / CONFIG
    complete = json.loads(config.read_text(encoding="utf-8")) | parents_metadata(lora.parents)
    config.write_text(json.dumps(complete, indent=2, sort_keys=True), encoding="utf-8")
    torch.save({name: x.clone() for name, x in _named(lora, "{}.lora_{}.default.weight").items()}, folder / "generator_ema.pt")


def _save_config(lora: Lora, folder: Path, base: str | None) -> None:
    """Writes adapter_config.json."""
    config = peft_config(lora, base)
    config.target_modules = sorted(lora.layers)  # PEFT makes a set of them, whose order differs from process to process
    config.save_pretrained(str(folder))


def _named(lora: Lora, pattern: str) -> dict[str, torch.Tensor]:
    return {pattern.format(layer, side): x for layer, pair in lora.layers.items() for side, x in zip("AB", pair, strict=True)}


def _pattern(layer: str) -> str:
    """PEFT reads patterns as expressions that match the end of a name; this one is the whole name alone."""
    return f"^{re.escape(layer)}$"


def _short(alpha: float) -> float | int:
    return int(alpha) if alpha == int(alpha) else alpha
