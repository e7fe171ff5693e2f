"""Images as the CLIP family wants them: resized and cut to a square, in [0, 1], then normalised.

    bicubic_crop          PickScore, Aesthetic, ImageReward: Pillow on 8 bits, as transformers' CLIP processor
    bicubic_crop_tensor   the same with a gradient, without the rounding
    bilinear_crop         ClipScore: torchvision's default for tensors, bilinear with antialiasing
    fit_longest           HPSv2: the whole image, black bars around it

A crop reads the middle only, so of an image longer than 16 times its short side the ends are dropped
before the resize, which would otherwise make millions of pixels. Floating types coarser than fp32 are
resized in fp32, finer ones are kept.
"""

from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from flowtilt.io.images import to_pil

Rounding = Literal["floor", "half_even"]

MEAN = (0.48145466, 0.4578275, 0.40821073)
STD = (0.26862954, 0.26130258, 0.27577711)
LONGEST = 16
"""Short sides that the middle part of a very long image keeps."""


def normalize(x: Tensor) -> Tensor:
    """(x - mean) / std by channel of [..., 3, H, W], with the figures of OpenAI's CLIP."""
    mean, std = (torch.tensor(values, dtype=x.dtype, device=x.device)[:, None, None] for values in (MEAN, STD))
    return (x - mean) / std


def bicubic_crop(images: Tensor, size: int = 224, rounding: Rounding = "floor") -> Tensor:
    """[N, 3, size, size] in [0, 1], fp32: rounded to 8 bits, resized by Pillow, cut from the middle.

    Equal to transformers' CLIPImageProcessorPil before its normalisation, bit by bit. An image with a NaN is all NaN.

    Args:
        images: [N, 3, H, W] in [0, 1].
        rounding: of an odd margin's half; transformers takes the floor, torchvision Python's `round`.
    """
    images = _middle(images)
    height, width = _covering(images, size)
    top, left = _offset(height - size, rounding), _offset(width - size, rounding)
    box = (left, top, left + size, top + size)
    crops = [picture.resize((width, height), Image.Resampling.BICUBIC).crop(box) for picture in to_pil(images)]
    pixels = torch.from_numpy(np.stack([np.asarray(crop) for crop in crops])).permute(0, 3, 1, 2).contiguous()
    missing = images.isnan().flatten(1).any(1)[:, None, None, None]
    return (pixels.to(images.device).float() / 255).masked_fill(missing, torch.nan)


def bicubic_crop_tensor(images: Tensor, size: int = 224, rounding: Rounding = "floor") -> Tensor:
    """`bicubic_crop` without rounding to 8 bits, with a gradient to the images; within 1.2 grey levels of it.

    Bicubic weights overshoot at edges; Pillow's 8 bits clamp that after each of two passes, along rows
    first, and so does this.
    """
    images = _middle(images)
    height, width = _covering(images, size)
    rows = _resize(images, images.shape[-2], width, "bicubic").clamp(0, 1)
    return _cut(_resize(rows, height, width, "bicubic").clamp(0, 1), size, rounding)


def bilinear_crop(images: Tensor, size: int = 224) -> Tensor:
    """[N, 3, size, size]: resized bilinearly with antialiasing, cut from the middle as torchvision's CenterCrop does."""
    images = _middle(images)
    return _cut(_resize(images, *_covering(images, size), "bilinear"), size, "half_even")


def fit_longest(images: Tensor, size: int = 224) -> Tensor:
    """[N, 3, size, size]: the longer side becomes `size`, the rest is black; after HPSv2's preprocessing.

    Bicubic with antialiasing and not clamped, so values may lie some hundredths outside [0, 1]. HPSv2 itself pads
    no image whose longer side is `size` already, which its square network can't read; here it is padded too.
    """
    height, width = images.shape[-2:]
    scale = size / max(height, width)
    fitted = _resize(images, max(1, round(height * scale)), max(1, round(width * scale)), "bicubic")
    down, across = size - fitted.shape[-2], size - fitted.shape[-1]
    return F.pad(fitted, (across // 2, across - across // 2, down // 2, down - down // 2))


def _cut(images: Tensor, size: int, rounding: Rounding) -> Tensor:
    top, left = (_offset(side - size, rounding) for side in images.shape[-2:])
    return images[..., top : top + size, left : left + size]


def _resize(images: Tensor, height: int, width: int, mode: str) -> Tensor:
    # antialiasing is not implemented for half precision on the CPU
    images = images.to(torch.promote_types(images.dtype, torch.float32))
    if images.shape[-2:] == (height, width):
        return images
    return F.interpolate(images, (height, width), mode=mode, antialias=True, align_corners=False)


def _covering(images: Tensor, size: int) -> tuple[int, int]:
    """Height and width with the shorter one `size`, the longer one rounded down."""
    height, width = images.shape[-2:]
    longer = int(size * max(height, width) / min(height, width))
    return (size, longer) if height <= width else (longer, size)


def _offset(margin: int, rounding: Rounding) -> int:
    return margin // 2 if rounding == "floor" else round(margin / 2)


def _middle(images: Tensor) -> Tensor:
    """The images without the ends that no crop reads, about the same centre."""
    height, width = images.shape[-2:]
    cuts = [max(0, side - LONGEST * min(height, width)) // 2 for side in (height, width)]
    return images[..., cuts[0] : height - cuts[0], cuts[1] : width - cuts[1]]
