"""Pictures between files, Pillow and tensors.

A tensor of images is float32 [N, 3, H, W] in [0, 1]; rounding to 8 bits is half to even, as torch rounds.
"""

import warnings
from collections.abc import Sequence
from functools import cache, lru_cache
from io import BytesIO
from pathlib import Path

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from flowtilt.errors import UserError

LARGEST = 64 * 2**20
"""Pixels of a picture that is read; more is taken for a decompression bomb."""
FORMATS = ("PNG", "JPEG", "WEBP", "AVIF", "GIF", "JPEG2000", "TIFF", "BMP", "DIB", "PPM")
"""What is read, by content and whatever the file's name. EPS, which Pillow hands to Ghostscript, is not among them."""
ENDINGS = (
    *(".png", ".apng", ".jpg", ".jpeg", ".jpe", ".jfif", ".mpo", ".webp", ".avif", ".avifs", ".gif"),
    *(".jp2", ".j2k", ".j2c", ".jpc", ".jpf", ".jpx", ".tif", ".tiff", ".bmp", ".dib", ".ppm", ".pgm", ".pbm", ".pnm", ".pfm"),
)
"""How names of such files end, in lower case."""
SHEET = "flowtilt-sheet"
"""A PNG's text of this key says that it shows several images, or enlarged ones, to be looked at."""
ORIENTATION = 0x0112
UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""What makes a picture upright, by its EXIF orientation."""


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


def sheet(columns: Sequence[Tensor]) -> Image.Image:
    """Columns of images [N, 3, H, W] as one picture; tiny ones are enlarged to be seen."""
    gap = 0 if len(columns) == 1 and len(columns[0]) == 1 else 4
    _, _, height, width = columns[0].shape
    zoom = max(1, 256 // width)
    whole = Image.new("RGB", (len(columns) * (width * zoom + gap) - gap, len(columns[0]) * (height * zoom + gap) - gap), "white")
    for c, column in enumerate(columns):
        for r, picture in enumerate(to_pil(column)):
            tile = picture.resize((width * zoom, height * zoom), Image.Resampling.NEAREST)
            whole.paste(tile, (c * (width * zoom + gap), r * (height * zoom + gap)))
    return whole


def from_pil(picture: Image.Image) -> Tensor:
    """[3, H, W] in [0, 1] of a picture, its first frame if it is animated, as a viewer without colour management shows it.

    EXIF's orientation is applied and nothing else of EXIF is read. Alpha, also a palette's, is laid on white. Integers of 16
    and 32 bits and floats: see `_grey`.

    Raises:
        ValueError: pixels that have no place in [0, 1].
    """
    picture.load()  # turns a TIFF upright, which then has no orientation any more
    picture = _upright(picture)
    if picture.mode.startswith("I") or picture.mode == "F":
        return _grey(picture).expand(3, -1, -1).contiguous()
    if picture.has_transparency_data:
        picture = Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture.convert("RGBA"))
    pixels = np.array(picture.convert("RGB"))
    return torch.from_numpy(pixels).permute(2, 0, 1).float() / 255


def _upright(picture: Image.Image) -> Image.Image:
    try:
        orientation = picture.getexif().get(ORIENTATION)
    except Exception:  # an EXIF block that can't be read at all has no orientation to tell
        return picture
    return picture.transpose(UPRIGHT[orientation]) if isinstance(orientation, int) and orientation in UPRIGHT else picture


def _grey(picture: Image.Image) -> Tensor:
    """[H, W] in [0, 1] of one channel of more than 8 bits.

    16 bits keep their range. 32 bits, whose range the file does not tell, have the smallest of [0, 1] (floats alone), [0, 255] and
    [0, 65535] that holds them; up to 2 is [0, 1] with an overshoot.
    """
    values = np.asarray(picture)
    transparent = picture.info.get("transparency")
    if picture.mode.startswith("I;16") or (picture.format == "PPM" and picture.mode == "I"):
        whole = 65535.0
    else:
        if not np.isfinite(values).all():
            raise ValueError("pixels that are not finite")
        highest, lowest = float(values.max(initial=0)), float(values.min(initial=0))
        whole = 1.0 if picture.mode == "F" and highest <= 2 else 255.0 if highest <= 255 else 65535.0
        if highest > 65535 or lowest < -0.1 * whole:
            raise ValueError(f"pixels from {lowest:g} to {highest:g}; save 8 or 16 bits per channel")
    grey = torch.from_numpy(values.astype(np.float32) / np.float32(whole)).clamp(0, 1)
    return grey.masked_fill(torch.from_numpy(values == transparent), 1) if isinstance(transparent, int) else grey


@cache
def _formats() -> tuple[str, ...]:
    """Those of `FORMATS` that this Pillow was built with."""
    Image.init()
    return tuple(name for name in FORMATS if name in Image.OPEN)


def read_image(source: Path | bytes) -> Tensor:
    """[3, H, W] in [0, 1] of an image file or its bytes; see `FORMATS` and `from_pil`.

    Raises:
        UserError: the file is missing, no image that can be read, truncated, of more than 64 megapixels, or a sheet of several images.
    """
    where = str(source) if isinstance(source, Path) else "image"
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow's: on large images, which are refused here, and on broken EXIF
            with Image.open(BytesIO(source) if isinstance(source, bytes) else source, formats=_formats()) as picture:
                if picture.width * picture.height > LARGEST:
                    size = f"{picture.width} x {picture.height}"
                    raise UserError(f"{where}: {size} pixels are too many; at most {LARGEST // 2**20} megapixels")
                if SHEET in picture.info:
                    raise UserError(f"{where}: a contact sheet of `flowtilt sample`, not an image; score the images themselves")
                return from_pil(picture)
    except UserError:
        raise
    except FileNotFoundError:
        raise UserError(f"{where}: no such file") from None
    except Image.DecompressionBombError:
        raise UserError(f"{where}: too many pixels; at most {LARGEST // 2**20} megapixels") from None
    except UnidentifiedImageError:
        raise UserError(f"{where}: not an image that can be read; {', '.join(_formats()[:8])} and the like are") from None
    except Exception as error:  # Pillow's decoders raise anything at all
        why = " ".join(str(getattr(error, "strerror", None) or error).split()) or type(error).__name__
        raise UserError(f"{where}: can't be read, it may be truncated: {why}") from None


@lru_cache(maxsize=256)
def read_square(file: str, side: int) -> Tensor:
    """[3, side, side] in [0, 1], in 256 steps: the middle square of an image file, made larger or smaller; "" is grey.

    Raises:
        UserError: as `read_image`.
    """
    if not file:
        return torch.full((3, side, side), 128 / 255)
    (whole,) = to_pil(read_image(Path(file))[None])
    least = min(whole.size)
    left, top = (whole.width - least) // 2, (whole.height - least) // 2
    square = whole.crop((left, top, left + least, top + least))
    return from_pil(square.resize((side, side), Image.Resampling.LANCZOS))


def check_image(file: str) -> None:
    """Raises UserError where a file is missing or is no image; of its content only the head is read."""
    try:
        with Image.open(file, formats=_formats()):
            pass
    except FileNotFoundError:
        raise UserError(f"{file}: no such file") from None
    except Exception as error:  # Pillow's decoders raise anything at all
        why = "" if isinstance(error, UnidentifiedImageError) else f" ({' '.join(str(error).split())})"
        raise UserError(f"{file}: not an image that can be read{why}; {', '.join(_formats()[:8])} and the like are") from None
