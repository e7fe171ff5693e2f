"""Opening a model: a diffusers pipeline by folder or hub id, and the adapter of its family."""

import inspect
import os
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline
from diffusers.utils import logging as diffusers_logging
from huggingface_hub.errors import HfHubHTTPError
from torch import nn
from transformers.utils import logging as transformers_logging

from flowtilt.config import ModelSettings
from flowtilt.device.placement import should_offload
from flowtilt.errors import UserError
from flowtilt.io import hub
from flowtilt.io.containment import contained
from flowtilt.io.files import digest, shown
from flowtilt.io.user_code import from_file, search_path
from flowtilt.io.user_errors import HINT, describe_error, first_line, is_fault
from flowtilt.lora.find import first_in
from flowtilt.models.base import Model
from flowtilt.models.family import Family
from flowtilt.models.fused_norm import fuse_norms
from flowtilt.models.quantized import quantize
from flowtilt.models.sharded import shard

FAMILIES = {
    "StableDiffusion3Pipeline": "sd3:SD3",
    "FluxPipeline": "flux:Flux",
    "Flux2KleinPipeline": "flux2:Flux2Klein",
    "Flux2Pipeline": "flux2:Flux2Dev",
    "SanaPipeline": "sana:Sana",
    "Lumina2Pipeline": "lumina2:Lumina2",
    "ChromaPipeline": "chroma:Chroma",
    "AuraFlowPipeline": "aura_flow:AuraFlow",
    "QwenImagePipeline": "qwen_image:QwenImage",
    "QwenImage21Pipeline": "qwen_image_21:QwenImage21",
    "QwenImageEditPipeline": "qwen_image_edit:QwenImageEdit",
    "QwenImageEditPlusPipeline": "qwen_image_edit:QwenImageEditPlus",
    "FluxKontextPipeline": "kontext:Kontext",
    "ZImagePipeline": "z_image:ZImage",
}
"""Module and class of each family by its pipeline's class."""
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def open_model(settings: ModelSettings, device: torch.device, sharded: bool = False, at_most: int | None = None) -> Model:
    """Loads a model.

    Args:
        at_most: the resolution where the settings have none and the pipeline's own is larger.
        sharded: every rank loads the network into the computer's memory and keeps its part of it on `device`.

    Raises:
        UserError: nothing can be loaded from there, or there is no adapter for its family.
    """
    offload = should_offload(settings.offload, device)
    pipeline = load_pipeline(
        settings.path,
        revision=settings.revision,
        dtype=settings.dtype,
        device=device,
        offload=offload,
        elsewhere=sharded or settings.quantize is not None,
    )
    model = adapted(settings, pipeline, offload)
    if at_most and settings.resolution is None and model.resolution > at_most:
        settings = settings.model_copy(update={"resolution": at_most})
        model = adapted(settings, pipeline, offload)
    if sharded:
        shard(model, device)
        model = adapted(settings, pipeline, offload)  # once more: an adapter takes its device from the network
    if settings.quantize:
        quantize(model, settings.quantize, device)
        told, model = model.protocol, adapted(settings, pipeline, offload)
        model.protocol = told
    if settings.levels == "stock":
        model.levels = model.levels.stock()
        model.protocol = {**model.protocol, **model.levels.protocol()}
    if settings.fuse_norms and not fuse_norms(model.network):
        raise UserError("model.fuse_norms: the network has no RMSNorm of diffusers in half precision; leave it out")
    if settings.attention:
        try:
            model.network.set_attention_backend(settings.attention)
        except (ValueError, RuntimeError, ImportError) as error:
            raise UserError(f"model.attention: {settings.attention!r} can't be used here: {first_line(error)}") from error
    return model


def adapted(settings: ModelSettings, pipeline: Any, offload: bool) -> Model:
    """The pipeline's adapter, built with what the recipe sets for it."""
    family = _family(settings, pipeline)
    if getattr(family, "save_lora", None) is Family.save_lora and not hasattr(pipeline, "save_lora_weights"):
        raise UserError(
            f"model {settings.path}: diffusers' {type(pipeline).__name__} has no save_lora_weights; "
            f"give {family.__name__} a save_lora of its own"
        )
    given = {"t5_length": settings.t5_length, "resolution": settings.resolution}
    keywords: dict[str, Any] = {**settings.options, **{name: value for name, value in given.items() if value is not None}}
    try:
        inspect.signature(family).bind(pipeline, offload=offload, **keywords)
    except TypeError as error:
        raise UserError(f"model: {family.__name__} can't be built with the recipe's model settings: {error}") from None
    if not settings.adapter:
        return family(pipeline, offload=offload, **keywords)
    what = shown(settings.adapter)
    try:
        with contained(what, path=search_path(family), slow=what):
            model = family(pipeline, offload=offload, **keywords)
    except UserError:
        raise
    except BaseException as error:
        if not is_fault(error):
            raise
        raise UserError(f"model.adapter: building {shown(settings.adapter)} failed: {describe_error(error)} ({HINT})") from error
    asked = [*Model.__annotations__, *(name for name in vars(Model) if not name.startswith("_"))]
    if missing := [name for name in asked if not hasattr(model, name)]:
        raise UserError(
            f"model.adapter: {shown(settings.adapter)} has no {', '.join(missing)}; flowtilt.models.base.Model says what each is"
        )
    return model


def _family(settings: ModelSettings, pipeline: Any) -> Any:
    """The adapter of a pipeline's family: a class, called with the pipeline and the model's settings."""
    if settings.adapter:
        return from_file("model.adapter", settings.adapter)
    kind = type(pipeline).__name__
    if kind in FAMILIES:
        module, _, name = FAMILIES[kind].partition(":")
        return getattr(import_module(f"flowtilt.models.{module}"), name)
    raise UserError(
        f"model {settings.path}: a {kind}, for which flowtilt has no family; subclass flowtilt.models.family.Family, or Packed where "
        'the network sees 2 x 2 patches of latents as tokens, and name it as model.adapter = "file.py:Class" (docs/guides/add-a-model.md)'
    )


def load_pipeline(
    path: str, *, revision: str | None, dtype: str, device: torch.device, offload: bool = False, elsewhere: bool = False
) -> Any:
    """Loads a folder or hub id; "playground" is the pipeline inside the package.

    Components that the folder leaves empty, such as SD3's T5, stay empty. The VAE is fp32 as it was saved: the eight bits of a bfloat16
    are fewer than a picture's eight near white, and every score is of pictures.

    Args:
        dtype: of the other modules; "auto" is bfloat16 on a GPU and float32 on a CPU.
        offload: text encoders stay in the computer's memory, off the device.
        elsewhere: so does the network, which is sharded or quantised on its way to the device.

    Raises:
        UserError: nothing can be loaded from there.
    """
    place = folder_of(path)
    if dtype == "auto":
        dtype = "bfloat16" if device.type == "cuda" else "float32"
    if os.path.isdir(place) and not os.path.exists(os.path.join(place, "model_index.json")):
        lora = "it has a LoRA: give it as --lora, and its base as --model" if first_in(Path(place)) else ""
        raise UserError(f"model {path}: no model_index.json there; {lora or 'give the folder that save_pretrained wrote'}")
    loggers = [logging for logging in (diffusers_logging, transformers_logging) if logging.is_progress_bar_enabled()]
    for logging in loggers:
        logging.disable_progress_bar()
    try:
        if not os.path.isdir(place):
            place = str(hub.pipeline_folder(place, revision))
        index: Any = DiffusionPipeline.load_config(place)
        empty = {name: None for name, value in index.items() if value == [None, None]}
        pipeline: Any = DiffusionPipeline.from_pretrained(place, dtype={"default": DTYPES[dtype], "vae": torch.float32}, **empty)
    except UserError:
        raise
    except Exception as error:  # the hub, the disk and three libraries each raise their own
        raise UserError(f"model {path}{_why(path, error)}") from error
    finally:
        for logging in loggers:
            logging.enable_progress_bar()
    for name, module in pipeline.components.items():
        if isinstance(module, nn.Module):
            module.requires_grad_(False).eval()
            if not (offload and name.startswith("text_encoder")) and not (elsewhere and name == "transformer"):
                module.to(device)
    return pipeline


def folder_of(path: str) -> str:
    """A model's path, that of the playground being inside the package."""
    if path != "playground":
        return path
    from flowtilt.playground import pipeline_path

    return str(pipeline_path())


def _why(path: str, error: Exception) -> str:
    """What to do about a pipeline that can't be loaded, to go on after its name."""
    if not os.path.isdir(path):
        if not hub.is_hub_id(path):
            return ": no such folder; a model on the hub is owner/name"
        from_hub = any(isinstance(one, HfHubHTTPError) for one in hub.chain(error)) or hub.is_offline(error)
        if from_hub or "offline" in str(error).lower():
            return f" {hub.reason(path, error, hub.FETCH)}, or give a folder that has it"
    return f": can't be loaded as a diffusers pipeline: {first_line(error)}"


def fingerprint(path: str, revision: str | None) -> dict[str, str]:
    """Which weights these are: a hub snapshot's commit, or the SHA-256 of each weights file of a folder."""
    place = folder_of(path)
    if os.path.isdir(place):
        return {str(file.relative_to(place)): digest(file) for file in sorted(Path(place).rglob("*.safetensors"))}
    from huggingface_hub import try_to_load_from_cache

    cached = try_to_load_from_cache(place, "model_index.json", revision=revision)
    return {"commit": Path(cached).parent.name} if isinstance(cached, str) else {}
