"""An animation of a run's samples, for the README: `python docs/tools/gif.py RUN docs/images/training.gif`.

Made of the images that the run's evaluations have kept. Train with, for instance,
`flowtilt train playground-fast evaluate.every=2 evaluate.images=48 evaluate.samples=48`.
"""

import argparse
import json
import sys
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

COLUMNS, ROWS, SIDE, GAP, HEAD = 8, 3, 84, 6, 34
PAPER, INK, RIGHT, WRONG = "#ffffff", "#1c2024", "#17753a", "#d0d4d9"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run", type=Path)
    parser.add_argument("output", type=Path)
    args = parser.parse_args()
    frames = [frame(folder) for folder in sorted((args.run / "samples").glob("step-*"))]
    strip = Image.new("RGB", (frames[0].width, sum(one.height for one in frames)))
    for number, one in enumerate(frames):
        strip.paste(one, (0, number * one.height))
    colours = strip.quantize(128)  # one palette for all frames
    palette = [one.quantize(palette=colours, dither=Image.Dither.NONE) for one in frames]
    durations = [1400] + [450] * (len(frames) - 2) + [3000]
    palette[0].save(args.output, save_all=True, append_images=palette[1:], duration=durations, loop=0, optimize=True)
    print(f"{args.output}: {len(frames)} frames, {args.output.stat().st_size / 1e6:.2f} MB")
    return 0


def frame(folder: Path) -> Image.Image:
    """The first images of one evaluation, those that the verifier accepts framed in green."""
    index = json.loads((folder / "index.json").read_text())[: COLUMNS * ROWS]
    width = COLUMNS * (SIDE + GAP) + GAP
    sheet = Image.new("RGB", (width, HEAD + ROWS * (SIDE + GAP) + GAP), PAPER)
    pen, right = ImageDraw.Draw(sheet), 0
    for number, entry in enumerate(index):
        left, top = GAP + number % COLUMNS * (SIDE + GAP), HEAD + GAP + number // COLUMNS * (SIDE + GAP)
        with Image.open(folder / entry["file"]) as image:
            sheet.paste(image.convert("RGB").resize((SIDE, SIDE), Image.Resampling.NEAREST), (left, top))
        accepted = entry["score"] == 1
        right += accepted
        pen.rectangle((left - 3, top - 3, left + SIDE + 2, top + SIDE + 2), outline=RIGHT if accepted else WRONG, width=3)
    text = f"rollout {int(folder.name.rpartition('-')[2])}      {right} of {len(index)} match their caption"
    pen.text((GAP, 8), text, fill=INK, font=ImageFont.load_default(17))
    return sheet


if __name__ == "__main__":
    sys.exit(main())
