"""Reading LoRAs: diffusers' and PEFT's files, flat state dicts as RTDMD's generator_ema.pt, and our own checkpoints.

Tensor names tell the layers, so one reader serves all. What differs is who knows alpha: diffusers' file has
it in its metadata, or in older files in a tensor beside the layer, or it is the rank; PEFT has it in
adapter_config.json; a checkpoint's run in its recipe; a flat state dict nowhere, so that it must be told. The same
places, but a checkpoint's state.json for the recipe, say which LoRAs lie beneath one that we trained.
"""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from diffusers.loaders.lora_base import LORA_ADAPTER_METADATA_KEY
from peft.utils.other import get_pattern_key
from safetensors import SafetensorError, safe_open
from torch import Tensor

from flowtilt import weights
from flowtilt.config import load_recipe
from flowtilt.errors import UserError
from flowtilt.lora import PARENTS, Lora
from flowtilt.lora.find import Found, find

PREFIXES = ("module.", "base_model.model.", "transformer.")
"""Of DDP, PEFT and diffusers."""
WRAPPERS = {"_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"}
"""Parts that torch's wrappers put into names."""
NAME = re.compile(r"(?P<layer>.+)\.(?:lora_(?P<side>[AB])(?:\.(?P<adapter>[^.]+))?|lora\.(?P<old>down|up))\.weight")
"""PEFT's names, with or without the adapter's, and diffusers' older ones."""
CHANGES_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")
"""Ways to start that also change the base, so that B A alone is not the difference."""
BEYOND_LORA = ("modules_to_save", "use_dora", "lora_bias", "layer_replication", "trainable_token_indices")
"""Keys of a PEFT configuration by which an adapter is more than W + scale B A."""


def read_lora(place: Path | str) -> Lora:
    """The LoRA of a run (its newest EMA), a checkpoint, a folder or a file; "PATH@64" says or overrules alpha.

    Raises:
        UserError: there is none, it is damaged or incomplete, it is more than a LoRA, or nothing tells its alpha.
    """
    found = find(place)
    tensors, metadata = _load(found.weights)
    pairs, alphas = _sort(found.weights, tensors)
    layers = {layer: _pair(found.weights, layer, sides) for layer, sides in pairs.items()}
    if not layers:
        first = f"{len(tensors)} tensors, {min(tensors)} first" if tensors else "nothing"
        raise UserError(
            f"lora {found.weights}: holds {first}; LoRA weights have names such as transformer_blocks.0.attn.to_q.lora_A.weight"
        )
    of_diffusers = any(name.startswith("transformer.") for name in tensors)
    told = _alphas(found, {layer: len(a) for layer, (a, _) in layers.items()}, metadata, alphas, of_diffusers)
    return Lora(layers, told, str(found.weights), _parents(found, metadata))


def _load(file: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors by their names in the file, and a safetensors file's metadata."""
    if file.suffix != ".safetensors":
        tensors = weights.read(file)
        other = next((f"{name}, a {type(value).__name__}" for name, value in tensors.items() if not isinstance(value, Tensor)), None)
        if other:
            raise UserError(f"lora {file}: holds {other}, instead of named tensors alone")
        return tensors, {}
    try:
        with safe_open(file, "pt") as opened:
            return {name: opened.get_tensor(name) for name in opened.keys()}, opened.metadata() or {}  # noqa: SIM118 - not a dict
    except (SafetensorError, OSError) as error:
        raise UserError(f"lora {file}: not a readable safetensors file ({error})") from None


def _sort(file: Path, tensors: Mapping[str, Tensor]) -> tuple[dict[str, dict[str, Tensor]], dict[str, float]]:
    """Layer -> {"A": …, "B": …} and layer -> alpha, from the tensors' names."""
    pairs: dict[str, dict[str, Tensor]] = {}
    alphas: dict[str, float] = {}
    adapters: set[str] = set()
    beyond = []
    for key, value in tensors.items():
        name = _own_name(key)
        match = NAME.fullmatch(name)
        if match:
            side = match["side"] or {"down": "A", "up": "B"}[match["old"]]
            adapters.add(match["adapter"] or "")
            pairs.setdefault(match["layer"], {})[side] = value
        elif name.endswith(".alpha") and value.numel() == 1:
            alphas[name.removesuffix(".alpha")] = float(value)
        else:
            beyond.append(key)
    if pairs and beyond:
        raise UserError(
            f"lora {file}: also holds {min(beyond)}; an adapter with biases, DoRA's magnitudes or whole weights can't be added to a base"
        )
    if len(adapters) > 1:
        names = ", ".join(sorted(name or "one without a name" for name in adapters))
        raise UserError(f"lora {file}: holds several adapters ({names}); save the one that is meant")
    text = next((layer for layer in pairs if layer.startswith("text_encoder")), None)
    if text:
        raise UserError(f"lora {file}: also changes the text encoder ({text}), which is not supported: only the network's layers can be")
    return pairs, alphas


def _own_name(key: str) -> str:
    """A tensor's name without what wrappers, PEFT and diffusers put around it."""
    name = ".".join(part for part in key.split(".") if part not in WRAPPERS)
    while prefix := next((prefix for prefix in PREFIXES if name.startswith(prefix)), None):
        name = name.removeprefix(prefix)
    return name


def _pair(file: Path, layer: str, sides: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
    if len(sides) != 2:
        there, lacking = ("A", "B") if "A" in sides else ("B", "A")
        raise UserError(f"lora {file}: {layer} has lora_{there} and no lora_{lacking}; the file is incomplete")
    a, b = sides["A"], sides["B"]
    if a.ndim != 2 or b.ndim != 2 or a.shape[0] != b.shape[1]:
        raise UserError(f"lora {file}: lora_A {list(a.shape)} and lora_B {list(b.shape)} of {layer} are no [r, in] and [out, r]")
    return a.to(torch.float32).contiguous(), b.to(torch.float32).contiguous()


def _alphas(
    found: Found, ranks: Mapping[str, int], metadata: Mapping[str, str], tensors: Mapping[str, float], of_diffusers: bool
) -> dict[str, float]:
    """Alpha of each layer: what the user says, else what the file's own format says."""
    if found.alpha is not None:
        return dict.fromkeys(ranks, found.alpha)
    if of_diffusers:
        written = _json(found.weights, metadata.get(LORA_ADAPTER_METADATA_KEY, "{}"))
        config = {key.removeprefix("transformer."): value for key, value in written.items() if key.startswith("transformer.")}
        if "lora_alpha" in config:
            return _by_config(found.weights, config, ranks)
        # without either, diffusers takes the rank
        return {layer: tensors.get(layer, float(rank)) for layer, rank in ranks.items()}
    if found.config:
        return _by_config(found.config, _json(found.config, found.config.read_bytes()), ranks)
    if found.run:
        return dict.fromkeys(ranks, load_recipe(found.run / "recipe.toml").lora.alpha)
    if ranks.keys() <= tensors.keys():
        return {layer: tensors[layer] for layer in ranks}
    raise UserError(
        f"lora {found.weights}: its format does not tell alpha; write {found.weights}@ALPHA, RTDMD's being 64 for its rank 32, "
        "or put its adapter_config.json beside it"
    )


def _parents(found: Found, metadata: Mapping[str, str]) -> tuple[str, ...]:
    """Fingerprints of what lies beneath: as the file has them, else the configuration beside it, else its checkpoint."""
    if found.run:
        state = found.weights.parent / "state.json"
        told = _json(state, state.read_bytes()).get("state", {}).get("parents", [])
    else:
        config = _json(found.config, found.config.read_bytes()) if found.config and PARENTS not in metadata else metadata
        text = config.get(PARENTS, "[]")
        try:
            told = json.loads(text)
        except (ValueError, TypeError):
            told = text
    if not isinstance(told, list) or not all(isinstance(one, str) and re.fullmatch("[0-9a-f]{64}", one) for one in told):
        raise UserError(f"lora {found.weights}: what it says of the LoRAs beneath it is damaged: {told!r:.80}")
    return tuple(told)


def _json(file: Path, text: str | bytes) -> dict[str, Any]:
    try:
        read = json.loads(text)
    except ValueError as error:
        raise UserError(f"lora {file}: its configuration is damaged ({error})") from None
    if not isinstance(read, dict):
        raise UserError(f"lora {file}: its configuration is a {type(read).__name__} instead of an object")
    return read


def _by_config(file: Path, config: Mapping[str, Any], ranks: Mapping[str, int]) -> dict[str, float]:
    """Alpha of each layer as a PEFT configuration has it.

    Under rsLoRA (arXiv 2312.03732) PEFT scales by alpha / sqrt(r); that is an alpha of sqrt(r) times as much here.
    """
    kind = str(config.get("peft_type") or "LORA").rpartition(".")[2]
    start = str(config.get("init_lora_weights")).lower()
    beyond = [key for key in BEYOND_LORA if config.get(key)] + ["bias"] * (config.get("bias") not in (None, "none"))
    if kind != "LORA":
        raise UserError(f"lora {file}: a {kind} adapter, not a LoRA")
    if beyond:
        raise UserError(f"lora {file}: {beyond[0]} = {config[beyond[0]]!r} makes it more than a LoRA; it can't be added to a base")
    if start.startswith(CHANGES_BASE):
        raise UserError(f"lora {file}: init_lora_weights = {start!r} changes the base, too; convert it to a plain LoRA with PEFT")
    rank_of, alpha_of = config.get("rank_pattern") or {}, config.get("alpha_pattern") or {}
    found = {}
    for layer, rank in ranks.items():
        said = rank_of.get(get_pattern_key(list(rank_of), layer), config.get("r", rank))
        alpha = alpha_of.get(get_pattern_key(list(alpha_of), layer), config.get("lora_alpha"))
        if said != rank:
            raise UserError(f"lora {file}: says rank {said} for {layer}, but the weights have rank {rank}; they don't belong together")
        if not isinstance(alpha, int | float) or isinstance(alpha, bool):
            raise UserError(f"lora {file}: lora_alpha of {layer} is {alpha!r}; it must be a number")
        found[layer] = alpha * rank**0.5 if config.get("use_rslora") else float(alpha)
    return found
