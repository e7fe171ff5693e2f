"""The shapes of a pipeline, from its config.json files where it is on disk, else as its publisher has them."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from flowtilt.errors import UserError

Config = Mapping[str, Any]


@dataclass(frozen=True, eq=False)
class Geometry:
    """What the modules of a Stable Diffusion 3 pipeline are built from.

    Args:
        source: where that is known from.
        transformer, vae: diffusers' configurations.
        text_encoders: transformers' configurations of two CLIPs and the T5, none where there is none.
        tokens: length of a prompt for the CLIPs and the T5.
        shift: of the noise levels.
    """

    source: str
    transformer: Config
    vae: Config
    text_encoders: tuple[Config | None, ...]
    tokens: tuple[int, int] = (77, 512)
    shift: float = 3.0


_MEDIUM = {
    "sample_size": 128,
    "patch_size": 2,
    "in_channels": 16,
    "num_layers": 24,
    "attention_head_dim": 64,
    "num_attention_heads": 24,
    "joint_attention_dim": 4096,
    "caption_projection_dim": 1536,
    "pooled_projection_dim": 2048,
    "out_channels": 16,
    "pos_embed_max_size": 384,
    "dual_attention_layers": tuple(range(13)),
    "qk_norm": "rms_norm",
}
_VAE = {
    "block_out_channels": (128, 256, 512, 512),
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "layers_per_block": 2,
    "latent_channels": 16,
    "norm_num_groups": 32,
    "sample_size": 1024,
    "scaling_factor": 1.5305,
    "shift_factor": 0.0609,
    "use_quant_conv": False,
    "use_post_quant_conv": False,
}
_CLIP_L = {
    "model_type": "clip_text_model",
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "projection_dim": 768,
    "hidden_act": "quick_gelu",
    "eos_token_id": 2,
}
_CLIP_G = {
    "model_type": "clip_text_model",
    "hidden_size": 1280,
    "intermediate_size": 5120,
    "num_hidden_layers": 32,
    "num_attention_heads": 20,
    "projection_dim": 1280,
    "hidden_act": "gelu",
    "eos_token_id": 2,
}
_T5_XXL = {
    "model_type": "t5",
    "d_model": 4096,
    "d_ff": 10240,
    "d_kv": 64,
    "num_heads": 64,
    "num_layers": 24,
    "vocab_size": 32128,
    "feed_forward_proj": "gated-gelu",
}
_SD35_MEDIUM = Geometry("its published configuration", _MEDIUM, _VAE, (_CLIP_L, _CLIP_G, _T5_XXL))
_LARGE = {**_MEDIUM, "num_layers": 38, "num_attention_heads": 38, "caption_projection_dim": 2432, "pos_embed_max_size": 192}

KNOWN = {
    "stabilityai/stable-diffusion-3.5-medium": _SD35_MEDIUM,
    "stabilityai/stable-diffusion-3.5-large": replace(_SD35_MEDIUM, transformer={**_LARGE, "dual_attention_layers": ()}),
    "stabilityai/stable-diffusion-3-medium-diffusers": replace(
        _SD35_MEDIUM, transformer={**_MEDIUM, "pos_embed_max_size": 192, "dual_attention_layers": (), "qk_norm": None}
    ),
}
"""Pipelines on the hub, whose configurations are facts that need no download."""


def find_geometry(path: str, revision: str | None = None) -> Geometry:
    """The geometry of a folder, of a hub id in the cache or in `KNOWN`, or of "playground".

    Raises:
        UserError: it is none of them, or no Stable Diffusion 3 pipeline.
    """
    if path == "playground":
        from flowtilt.playground import pipeline_path

        return _read(pipeline_path(), path)
    folder = Path(path) if Path(path).is_dir() else _cached(path, revision)
    if folder is not None:
        return _read(folder, path)
    if path in KNOWN:
        return KNOWN[path]
    raise UserError(
        f"model {path}: neither a folder nor in the hub's cache, and plan knows the shapes of {', '.join(KNOWN)} alone; "
        "give the folder, or download it first; families other than Stable Diffusion 3 can't be planned"
    )


def _cached(repo: str, revision: str | None) -> Path | None:
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        found = [try_to_load_from_cache(repo, name, revision=revision) for name in ("model_index.json", "transformer/config.json")]
    except HFValidationError:  # a path that is no hub id either
        return None
    return Path(found[0]).parent if all(isinstance(place, str) for place in found) and isinstance(found[0], str) else None


def _read(folder: Path, path: str) -> Geometry:
    if not (folder / "model_index.json").is_file():
        raise UserError(f"model {path}: no model_index.json there; give the folder that save_pretrained wrote")
    index = _json(folder / "model_index.json", path)
    if index.get("_class_name") != "StableDiffusion3Pipeline":
        raise UserError(f"model {path}: plan reads Stable Diffusion 3 pipelines, this is a {index.get('_class_name')}")

    def part(name: str, file: str = "config.json") -> Config | None:
        # a pipeline may be saved without its T5: [null, null]
        return _json(folder / name / file, path) if (index.get(name) or [None])[0] else None

    transformer, vae, scheduler = part("transformer"), part("vae"), part("scheduler", "scheduler_config.json")
    if transformer is None or vae is None or scheduler is None:
        raise UserError(f"model {path}: its model_index.json leaves out the transformer, the vae or the scheduler")
    lengths = [part(name, "tokenizer_config.json") or {} for name in ("tokenizer", "tokenizer_3")]
    return Geometry(
        "its config.json files",
        transformer,
        vae,
        tuple(part(name) for name in ("text_encoder", "text_encoder_2", "text_encoder_3")),
        (lengths[0].get("model_max_length", 77), lengths[1].get("model_max_length", 512)),
        float(scheduler["shift"]),
    )


def _json(file: Path, path: str) -> Config:
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"model {path}: {file} can't be read: {error.strerror}") from None
    except ValueError as error:
        raise UserError(f"model {path}: {file} is not JSON: {error}") from None
    if not isinstance(found, dict):
        raise UserError(f"model {path}: {file} holds no configuration")
    return found
