"""A pipeline on the meta device: diffusers' own class around modules that have shapes and no numbers."""

import inspect
from collections.abc import Mapping
from typing import Any

import diffusers
import torch
import transformers
from torch import nn

from flowtilt.models.opening import DTYPES
from flowtilt.plan.geometry import Geometry


class Words:
    """Stands in for a tokenizer or a processor, of which the longest caption alone is known."""

    def __init__(self, model_max_length: int):
        self.model_max_length = model_max_length
        self.tokenizer = self

    def apply_chat_template(self, *messages: Any, **how: Any) -> list[list[int]]:
        """A conversation of no tokens."""
        return [[]]

    def encode(self, text: str) -> list[int]:
        """Some token."""
        return [0]


def build_pipeline(geometry: Geometry, dtype: str) -> Any:
    """The pipeline of a geometry, its modules in the precisions that `load_pipeline` gives them: the VAE fp32, others `dtype`."""
    kind = getattr(diffusers, geometry.pipeline)
    parts: dict[str, Any] = {
        name: None for name, one in inspect.signature(kind.__init__).parameters.items() if name != "self" and one.default is one.empty
    }
    for name, component in geometry.components.items():
        if name in parts:
            # a scheduler computes with its numbers
            with torch.device("cpu" if name == "scheduler" else "meta"):
                parts[name] = _built(*component)
    for name, module in parts.items():
        if isinstance(module, nn.Module):
            module.requires_grad_(False).eval()
            if name != "vae":
                _cast(module, dtype)
    return kind(**parts)


def encoders_of(pipeline: Any) -> Mapping[str, nn.Module]:
    """The text encoders of a pipeline by name."""
    found = {name: module for name, module in pipeline.components.items() if name.startswith("text_encoder")}
    return {name: module for name, module in found.items() if module is not None}


def _built(name: str, config: Mapping[str, Any]) -> Any:
    if "model_max_length" in config:
        return Words(config["model_max_length"])
    if hasattr(diffusers, name):
        return getattr(diffusers, name).from_config(dict(config))
    kind = getattr(transformers, name)
    return kind(kind.config_class.from_dict(dict(config)))


def _cast(module: nn.Module, dtype: str) -> None:
    nn.Module.to(module, DTYPES[dtype])  # diffusers' own warns of what is done next
    if dtype == "float16":
        kept = getattr(module, "_keep_in_fp32_modules", None) or ()
        for name, parameter in module.named_parameters():
            # transformers keeps these in fp32 where it is told fp16
            if any(one in name.split(".") for one in kept):
                parameter.data = parameter.data.float()
