"""The size of an image as a JPEG file, arXiv 2305.13301: a reward that needs no model, for trying things out.

Upstream registers the compressibility only. File sizes depend a little on Pillow's libjpeg.
"""

from collections.abc import Sequence
from io import BytesIO

import torch
from PIL import Image
from torch import Tensor

from flowtilt.io.images import to_pil
from flowtilt.prompts import Prompt


def incompressibility(images: Tensor, prompts: Sequence[Prompt]) -> Tensor:
    """Kilobytes (1000 bytes) of each image [N, 3, H, W] in [0, 1] at JPEG quality 95, [N]; the prompt is not read.

    An image with a NaN has no score.
    """
    sizes = torch.tensor([_bytes(picture) / 1000 for picture in to_pil(images)])
    return sizes.masked_fill(images.isnan().flatten(1).any(1).cpu(), torch.nan)


def compressibility(images: Tensor, prompts: Sequence[Prompt]) -> Tensor:
    """Minus the `incompressibility` over 500: -0.6 (noise at 512 x 512 pixels) to almost 0."""
    return -incompressibility(images, prompts) / 500


def _bytes(picture: Image.Image) -> int:
    buffer = BytesIO()
    picture.save(buffer, "JPEG", quality=95)
    return buffer.tell()
