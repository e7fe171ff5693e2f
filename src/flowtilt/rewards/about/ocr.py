"""OCR: how much of the text that a prompt asks for can be read in the image. Its models come inside the rapidocr package."""

from collections.abc import Mapping
from typing import Any

from flowtilt.rewards.about.base import BuiltIn


def _cost(options: Mapping[str, Any]) -> str:
    # measured with side = 512 and images of 512 pixels; the default side takes about three times as long (docs/reference/rewards.md)
    seconds = 0.14 * (1 if options.get("side") == 512 else 3)
    return f"on the CPU while images are sampled, about {seconds:.2f} s per image and core"


OCR = BuiltIn(
    name="ocr",
    source="flowtilt.rewards.ocr:OCR",
    score_range=(0.0, 1.0),
    off_device=True,
    plan_note=_cost,
    packages=("rapidocr", "onnxruntime"),
    paper_place=2,
)
