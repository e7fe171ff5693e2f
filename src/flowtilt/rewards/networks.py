"""A reward's model on the meta device, from which `flowtilt plan` counts its operations and memory."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Network:
    """A model as it judges images.

    Args:
        module: its parameters, fp32.
        chunk: images in one forward pass.
        shape: of an image as it reads it, (3, H, W).
        judge: one forward pass for images [chunk, 3, H, W].
        read: one for the tokens of a single prompt, where prompts are read apart from images.
        whole: whether all images are resized before the first chunk, not chunk by chunk.
    """

    module: nn.Module
    chunk: int
    shape: tuple[int, ...]
    judge: Callable[[Tensor], object]
    read: Callable[[], object] | None = None
    whole: bool = True


def no_tokens(length: int) -> Tensor:
    """Token ids [1, length] of no text."""
    return torch.zeros(1, length, dtype=torch.long)
