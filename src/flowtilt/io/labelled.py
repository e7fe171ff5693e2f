"""Images with words beside them, as one picture."""

from collections.abc import Sequence
from dataclasses import dataclass

from PIL import Image, ImageDraw, ImageFont

EDGE, GAP = 12, 6
"""Pixels around the picture, and between two images."""
INK, QUIET = "#1c2024", "#59626d"
SEEN = 256
"""Pixels; narrower images are enlarged to be seen."""


@dataclass(frozen=True)
class Captioned:
    """Images below a caption: rows of (label, image), all of one size."""

    caption: str
    rows: Sequence[Sequence[tuple[str, Image.Image]]]


def labelled(blocks: Sequence[Captioned]) -> Image.Image:
    """All blocks, one below the other; captions are wrapped to the width of the widest row."""
    first = blocks[0].rows[0][0][1]
    zoom = max(1, SEEN // first.width)
    width, height = first.width * zoom, first.height * zoom
    size = max(14, width // 30)
    font, line = ImageFont.load_default(size), round(1.35 * size)
    columns = max(len(row) for block in blocks for row in block.rows)
    whole = columns * (width + GAP) - GAP
    texts = [_wrapped(block.caption, font, whole) for block in blocks]
    tall = [len(text) * line + GAP + len(block.rows) * (line + height + GAP) for text, block in zip(texts, blocks, strict=True)]
    picture = Image.new("RGB", (whole + 2 * EDGE, sum(tall) + EDGE * (len(blocks) + 1)), "white")
    pen, top = ImageDraw.Draw(picture), EDGE
    for text, block, used in zip(texts, blocks, tall, strict=True):
        for k, words in enumerate(text):
            pen.text((EDGE, top + k * line), words, INK, font)
        y = top + len(text) * line + GAP
        for row in block.rows:
            for k, (label, image) in enumerate(row):
                x = EDGE + k * (width + GAP)
                pen.text((x, y), label, QUIET, font)
                picture.paste(image.resize((width, height), Image.Resampling.NEAREST), (x, y + line))
            y += line + height + GAP
        top += used + EDGE
    return picture


def _wrapped(text: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, width: int) -> list[str]:
    """Lines that are no wider, broken at spaces where that can be."""
    lines: list[str] = []
    for word in text.split():
        if lines and font.getlength(f"{lines[-1]} {word}") <= width:
            lines[-1] += f" {word}"
            continue
        while len(word) > 1 and font.getlength(word) > width:
            fits = next(n for n in range(len(word) - 1, 0, -1) if n == 1 or font.getlength(word[:n]) <= width)
            lines.append(word[:fits])
            word = word[fits:]
        lines.append(word)
    return lines or [""]
