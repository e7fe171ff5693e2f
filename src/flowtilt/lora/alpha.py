"""The alpha of each layer of a LoRA file: from its header, a configuration, or tensors beside the layers."""

import json
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from diffusers.loaders.lora_base import LORA_ADAPTER_METADATA_KEY
from peft.utils.other import get_pattern_key

from flowtilt.errors import UserError
from flowtilt.lora.names import own_name

CHANGES_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")
"""Ways to start that also change the base, so that B A alone is not the difference."""
BEYOND_LORA = ("modules_to_save", "use_dora", "lora_bias", "layer_replication", "trainable_token_indices")
"""Keys of a PEFT configuration by which an adapter is more than W + scale B A."""


def in_header(file: Path, metadata: Mapping[str, str]) -> dict[str, Any]:
    """The configuration in a safetensors header, empty where it has no lora_alpha.

    diffusers keeps it as JSON under a key of its own, "transformer." before each name; other tools as JSON under theirs, or as
    plain keys.

    Raises:
        UserError: diffusers' own is damaged.
    """
    found: dict[str, Any] = {}
    for key, text in metadata.items():
        if key == LORA_ADAPTER_METADATA_KEY:
            written = read_json(file, text)
        elif "lora_alpha" in text and text.lstrip().startswith("{"):
            written = _object(text)
        else:
            written = {key: _plain(text)}
        found |= {own_name(name): value for name, value in written.items()}
    return found if "lora_alpha" in found else {}


def by_config(file: Path, config: Mapping[str, Any], ranks: Mapping[str, int]) -> dict[str, float]:
    """Alpha of each layer as a PEFT configuration has it.

    Under rsLoRA (arXiv 2312.03732) PEFT scales by alpha / sqrt(r); that is an alpha of sqrt(r) times as much here.

    Raises:
        UserError: it is more than a LoRA's, does not belong to these ranks, or is damaged.
    """
    kind = str(config.get("peft_type") or "LORA").rpartition(".")[2]
    start = str(config.get("init_lora_weights")).lower()
    beyond = [key for key in BEYOND_LORA if config.get(key)] + ["bias"] * (config.get("bias") not in (None, "none"))
    if kind != "LORA":
        raise UserError(f"lora {file}: a {kind[:40]} adapter, not a LoRA")
    if beyond:
        raise UserError(f"lora {file}: {beyond[0]} = {config[beyond[0]]!r:.80} makes it more than a LoRA; it can't be added to a base")
    if start.startswith(CHANGES_BASE):
        raise UserError(f"lora {file}: init_lora_weights = {start!r:.80} changes the base, too; convert it to a plain LoRA with PEFT")
    rank_of, alpha_of = _pattern(file, config, "rank_pattern"), _pattern(file, config, "alpha_pattern")
    found = {}
    for layer, rank in ranks.items():
        said = rank_of.get(get_pattern_key(list(rank_of), layer), config.get("r", rank))
        alpha = number(file, layer, alpha_of.get(get_pattern_key(list(alpha_of), layer), config.get("lora_alpha")))
        if said != rank:
            raise UserError(
                f"lora {file}: says rank {said!r:.40} for {layer}, but the weights have rank {rank}; they don't belong together"
            )
        found[layer] = alpha * rank**0.5 if config.get("use_rslora") else alpha
    return found


def number(file: Path, layer: str, alpha: Any) -> float:
    """Alpha as a number.

    Raises:
        UserError: it is none, or not finite.
    """
    try:
        found = math.nan if isinstance(alpha, bool) or not isinstance(alpha, int | float) else float(alpha)
    except OverflowError:
        found = math.inf
    if not math.isfinite(found):
        raise UserError(f"lora {file}: lora_alpha of {layer} is {alpha!r:.40}; it must be a number")
    return found


def read_json(file: Path, text: str | bytes) -> dict[str, Any]:
    """A JSON object.

    Raises:
        UserError: it is damaged, or something else.
    """
    try:
        read = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UserError(f"lora {file}: its configuration is damaged ({error})") from None
    if not isinstance(read, dict):
        raise UserError(f"lora {file}: its configuration is a {type(read).__name__} instead of an object")
    return read


def read_config(file: Path) -> dict[str, Any]:
    """The JSON object in a file.

    Raises:
        UserError: it can't be read, or is damaged.
    """
    try:
        return read_json(file, file.read_bytes())
    except OSError as error:
        raise UserError(f"lora {file}: can't be read: {error.strerror}") from None


def _pattern(file: Path, config: Mapping[str, Any], key: str) -> dict[str, Any]:
    """A table of a PEFT configuration: expression -> number."""
    table = config.get(key) or {}
    if not isinstance(table, dict):
        raise UserError(f"lora {file}: {key} is {table!r:.80}; it must be an object, layer = number")
    for pattern in table:
        try:
            re.compile(rf"(.*\.)?({pattern})$")
        except (re.error, RecursionError, OverflowError) as error:
            raise UserError(f"lora {file}: {key}: {pattern!r:.80} is no regular expression ({error})") from None
    return table


def _plain(text: str) -> Any:
    """A header's value, which is text, as what it stands for."""
    try:
        return json.loads(text.lower() if text in ("True", "False", "None") else text)
    except (ValueError, RecursionError):
        return text


def _object(text: str) -> dict[str, Any]:
    found = _plain(text)
    return found if isinstance(found, dict) else {}
