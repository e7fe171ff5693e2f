"""Every model family with a small pipeline, as `flowtilt check-model` and training open it."""

import copy
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest.mock import patch

import tiny_pipelines
from diffusers.pipelines.qwenimage import pipeline_qwenimage_edit, pipeline_qwenimage_edit_plus
from torch import nn

from flowtilt.config import ModelSettings
from flowtilt.models import opening


@dataclass(frozen=True)
class Small:
    """A family's small pipeline.

    Args:
        settings: keys of a recipe's `[model]`.
        sizes: two resolutions that it can have, in pixels.
        parts: what takes the place of parts that the tests can't load, by name in the pipeline.
    """

    settings: Mapping[str, Any] = field(default_factory=dict)
    sizes: tuple[int, int] = (16, 24)
    parts: Mapping[str, Any] = field(default_factory=dict)


EDIT = Small({"options": {"source_resolution": 32}}, parts={"processor": tiny_pipelines.Seeing(14)})
SMALL = {
    "sd35": Small({"t5_length": 40}),
    "flux": Small({"t5_length": 40}),
    "kontext": Small({"t5_length": 40, "options": {"source_resolution": 12}}),
    "flux2_klein": Small({"options": {"text_length": 160}}),
    "flux2_dev": Small({"options": {"text_length": 48, "embedded_guidance": 2.5}}, parts={"tokenizer": tiny_pipelines.Letters()}),
    "qwen_image": Small({"options": {"text_length": 320}}),
    "qwen_image_21": Small(sizes=(32, 64)),
    "qwen_image_edit": EDIT,
    "qwen_image_edit_plus": EDIT,
    "z_image": Small({"options": {"text_length": 128}}),
    "sana": Small({"options": {"text_length": 40}}, (32, 64)),
    "lumina2": Small(sizes=(32, 48)),
    "aura_flow": Small({"options": {"text_length": 40}}),
    "chroma": Small({"options": {"text_length": 40}}),
}
"""By the name of the function of `tiny_pipelines` that makes it."""


@contextmanager
def opened(name: str, folder: Path) -> Iterator[tuple[ModelSettings, tuple[int, int]]]:
    """Settings and sizes of a family's small pipeline; inside, the parts that need torchvision have stand-ins.

    Args:
        folder: where the pipeline is; it is made there if the folder is empty.
    """
    small, load = SMALL[name], opening.load_pipeline
    if name == "qwen_image_21":  # its class can't be loaded without a processor
        made = tiny_pipelines.qwen_image_21(tiny_pipelines.Seeing(16))
        load = lambda path, *, dtype, **how: copied(made, dtype)  # noqa: E731
    elif not any(folder.iterdir()):
        getattr(tiny_pipelines, name)(folder)

    def with_parts(*args: Any, **how: Any) -> Any:
        pipeline = load(*args, **how)
        for part, stand_in in small.parts.items():
            setattr(pipeline, part, stand_in)
        return pipeline

    inner = folder / "pipeline" if (folder / "pipeline").is_dir() else folder
    settings = ModelSettings(path=str(inner), **small.settings)
    # the stock pipelines make every source image one of a megapixel
    edit, plus, dimensions = pipeline_qwenimage_edit, pipeline_qwenimage_edit_plus, pipeline_qwenimage_edit.calculate_dimensions
    with (
        patch.object(opening, "load_pipeline", with_parts),
        patch.object(plus, "VAE_IMAGE_SIZE", 32 * 32),
        patch.object(plus, "CONDITION_IMAGE_SIZE", 64 * 64),
        patch.object(edit, "calculate_dimensions", lambda area, ratio: dimensions(32 * 32, ratio)),
    ):
        yield settings, small.sizes


def copied(pipeline: Any, dtype: str) -> Any:
    """A pipeline as `load_pipeline` gives it: frozen, the VAE fp32, others `dtype`."""
    copy_of = copy.deepcopy(pipeline)
    for module in copy_of.components.values():
        if isinstance(module, nn.Module):
            module.requires_grad_(False).eval().to(opening.DTYPES[dtype])
    copy_of.vae.float()
    return copy_of
