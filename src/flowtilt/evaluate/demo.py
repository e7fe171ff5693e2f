"""The page of `flowtilt demo`: a prompt, a seed, and the two images."""

import os
import threading
from pathlib import Path
from typing import Any

from PIL import Image

from flowtilt.evaluate.side_by_side import SideBySide
from flowtilt.io.images import to_pil

os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")

import gradio  # pyright: ignore[reportMissingImports]

EXAMPLE = "a red circle left of a blue square"
SEEN = 512
"""Pixels; narrower images are enlarged to be seen."""


def page(pair: SideBySide, run: Path) -> Any:
    """The page, which is not served yet; samples are made one request at a time."""
    lock = threading.Lock()

    def sample(prompt: str, seed: float) -> list[Image.Image]:
        if not prompt.strip():
            raise gradio.Error("Type a prompt.")
        with lock:
            found = pair.images([prompt], [int(seed)])
        return [_shown(to_pil(found[role, int(seed), 0])[0]) for role in pair.roles]

    with gradio.Blocks(title=f"flowtilt: {run.name}", analytics_enabled=False) as application:
        gradio.Markdown(f"## {run.name}: base and tuned, from the same noise")
        with gradio.Row():
            prompt = gradio.Textbox(EXAMPLE, label="prompt", scale=4)
            seed = gradio.Number(0, label="seed", precision=0, minimum=0, scale=1)
            button = gradio.Button("Sample", variant="primary", scale=1)
        with gradio.Row():
            shots = [gradio.Image(label=role, type="pil", format="png", interactive=False) for role in pair.roles]
        gradio.on([button.click, prompt.submit], sample, [prompt, seed], shots, api_name="sample")
    return application


def _shown(image: Image.Image) -> Image.Image:
    zoom = max(1, SEEN // image.width)
    return image.resize((image.width * zoom, image.height * zoom), Image.Resampling.NEAREST)
