"""Images that `flowtilt score` reads: any bytes are a tensor in [0, 1] or a named missing one."""

from functools import cache
from io import BytesIO
from pathlib import Path

import numpy as np
from hypothesis import strategies as st
from PIL import Image

from flowtilt.io.images import read_image
from fuzzing._mutations import damaged

MODES = {
    "PNG": ("1", "L", "LA", "P", "RGB", "RGBA", "I;16"),
    "JPEG": ("L", "RGB", "CMYK"),
    "WEBP": ("RGB", "RGBA"),
    "AVIF": ("RGB",),
    "GIF": ("P", "RGB"),
    "JPEG2000": ("L", "RGB", "RGBA"),
    "TIFF": ("1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "I;16", "I", "F", "LAB"),
    "BMP": ("1", "L", "P", "RGB", "RGBA"),
    "PPM": ("1", "L", "RGB", "I;16"),
    "EPS": ("RGB",),
    "TGA": ("RGB",),
    "ICO": ("RGBA",),
    "PDF": ("RGB",),
}


@cache
def files() -> list[bytes]:
    """A small file of every format and mode, still, animated and with EXIF."""
    noise = np.random.default_rng(0).integers(0, 256, (9, 13, 4), np.uint8)
    exif = Image.Exif()
    exif[0x0112], exif[0x011A], exif[0x9286] = 6, 72.5, "a comment"
    found = []
    for format, modes in MODES.items():
        for mode in modes:
            if mode in ("I;16", "I", "F"):
                picture = Image.fromarray(noise[..., 0].astype({"I;16": np.uint16, "I": np.int32, "F": np.float32}[mode]))
            else:
                picture = Image.fromarray(noise).convert("RGB").convert(mode) if mode == "LAB" else Image.fromarray(noise).convert(mode)
            options = (
                [{}] if format in ("EPS", "TGA", "ICO", "PDF", "BMP", "PPM") or mode in ("I;16", "I", "F", "LAB") else [{}, {"exif": exif}]
            )
            options += [{"save_all": True, "append_images": [picture.rotate(90)]}] if format in ("GIF", "WEBP", "TIFF", "PNG") else []
            options += [{"compression": "tiff_lzw"}, {"compression": "jpeg"}] if (format, mode) == ("TIFF", "RGB") else []
            for option in options:
                buffer = BytesIO()
                try:
                    picture.save(buffer, format, **option)
                except (OSError, KeyError):  # a Pillow without this format
                    continue
                found.append(buffer.getvalue())
    return found


def inputs() -> st.SearchStrategy[bytes]:
    """Bytes of a file."""
    return damaged(files())


def read(payload: bytes, folder: Path) -> None:
    """Reads the file whatever its name says."""
    path = folder / "image.png"
    path.write_bytes(payload)
    image = read_image(path)
    assert image.ndim == 3 and image.shape[0] == 3 and image.numel() and str(image.dtype) == "torch.float32"
    assert 0 <= float(image.min()) <= float(image.max()) <= 1
