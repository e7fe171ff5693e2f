"""Images as data: URLs, small enough that a page of them can be sent by mail."""

import base64
from dataclasses import dataclass
from functools import lru_cache
from io import BytesIO
from pathlib import Path

from PIL import Image

PIXEL_ART = 64  # px; up to this size an image is kept as it is and shown with its pixels
LARGEST = 256  # px


@dataclass(frozen=True)
class Embedded:
    """A data: URL, and the size it has in pixels."""

    url: str
    width: int
    height: int

    @property
    def is_pixel_art(self) -> bool:
        return max(self.width, self.height) <= PIXEL_ART


def embed(path: Path) -> Embedded | None:
    """The image at `path`, at most 256 px wide and high; none where there is no whole image."""
    try:
        found = path.stat()
    except (OSError, ValueError):
        return None
    return _embed(path, found.st_mtime_ns, found.st_size)


@lru_cache(maxsize=512)  # the page of a run that goes on is written again and again
def _embed(path: Path, modified: int, size: int) -> Embedded | None:
    try:
        with Image.open(path) as file:
            image = file.convert("RGB")
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):
        return None
    image.thumbnail((LARGEST, LARGEST))
    small = max(image.size) <= PIXEL_ART
    buffer = BytesIO()
    # a JPEG would smear the few pixels of a small image
    image.save(buffer, "PNG", optimize=True) if small else image.save(buffer, "JPEG", quality=82, optimize=True)
    code = base64.b64encode(buffer.getvalue()).decode()
    return Embedded(f"data:image/{'png' if small else 'jpeg'};base64,{code}", image.width, image.height)
