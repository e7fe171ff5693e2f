"""How far an evaluation is."""

import sys

from tqdm import tqdm


def progress(images: int, hidden: bool = False) -> tqdm:
    """A bar over images. In a file, where each redrawing would be another line, it is drawn once a minute."""
    seconds = 0.1 if sys.stderr.isatty() else 60.0
    delay = 0.0 if sys.stderr.isatty() else seconds
    return tqdm(total=images, unit="image", disable=hidden, dynamic_ncols=True, smoothing=0.1, mininterval=seconds, delay=delay)
