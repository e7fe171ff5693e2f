"""Pictures between files, Pillow and tensors.

A tensor of images is float32 [N, 3, H, W] in [0, 1]; rounding to 8 bits is half to even, as torch rounds.
"""

from io import BytesIO
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from flowtilt.errors import UserError

LARGEST = 64 * 2**20
"""Pixels of a picture that is read; more is taken for a decompression bomb."""


def to_bytes(images: Tensor) -> Tensor:
    """uint8 [N, 3, H, W] of images in [0, 1]; values outside are clamped."""
    return (images.detach().float() * 255).round().clamp(0, 255).byte()


def to_pil(images: Tensor) -> list[Image.Image]:
    """One RGB picture an image of [N, 3, H, W]."""
    # in parts: rounding takes two more copies in fp32
    return [Image.fromarray(pixels) for part in images.split(64) for pixels in to_bytes(part).permute(0, 2, 3, 1).cpu().numpy()]


def to_png(image: Tensor, compress_level: int = 6) -> bytes:
    """A PNG file of an image [3, H, W]."""
    buffer = BytesIO()
    to_pil(image[None])[0].save(buffer, "PNG", compress_level=compress_level)
    return buffer.getvalue()


def from_pil(picture: Image.Image) -> Tensor:
    """[3, H, W] in [0, 1]. Alpha is laid on white, 16 bits keep their range, EXIF's rotation is applied."""
    picture = ImageOps.exif_transpose(picture)
    if picture.mode.startswith("I") or picture.mode == "F":
        grey = np.asarray(picture, dtype=np.float32)
        grey = grey / (65535 if grey.max(initial=0) > 255 or picture.mode.startswith("I;16") else 255)
        return torch.from_numpy(grey).clamp(0, 1).expand(3, -1, -1).contiguous()
    if "A" in picture.mode or "transparency" in picture.info:
        picture = Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture.convert("RGBA"))
    pixels = np.array(picture.convert("RGB"))
    return torch.from_numpy(pixels).permute(2, 0, 1).float() / 255


def read_image(source: Path | bytes) -> Tensor:
    """[3, H, W] in [0, 1] of a picture file or its bytes; see `from_pil`.

    Raises:
        UserError: the file is missing, no picture, truncated, or of more than 64 megapixels.
    """
    where = str(source) if isinstance(source, Path) else "image"
    try:
        with Image.open(BytesIO(source) if isinstance(source, bytes) else source) as picture:
            if picture.width * picture.height > LARGEST:
                raise UserError(f"{where}: {picture.width} x {picture.height} pixels are too many; at most {LARGEST // 2**20} megapixels")
            return from_pil(picture)
    except FileNotFoundError:
        raise UserError(f"{where}: no such file") from None
    except (UnidentifiedImageError, Image.DecompressionBombError):
        raise UserError(f"{where}: not a picture that Pillow can read") from None
    except (OSError, SyntaxError, ValueError) as error:
        raise UserError(f"{where}: can't be read, it may be truncated: {error}") from None
