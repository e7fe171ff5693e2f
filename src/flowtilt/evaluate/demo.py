"""The page of `flowtilt demo`: a prompt, a seed, and the two images."""

import os
import threading
from importlib import import_module
from pathlib import Path
from typing import Any

from PIL import Image

from flowtilt.errors import UserError
from flowtilt.evaluate.side_by_side import SideBySide
from flowtilt.io.images import to_pil

EXAMPLE = "a red circle left of a blue square"
SEEN = 512
"""Pixels; narrower images are enlarged to be seen."""


def gradio() -> Any:
    """The library, an extra whose import takes seconds.

    Raises:
        UserError: it is not installed.
    """
    os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")
    try:
        return import_module("gradio")
    except ModuleNotFoundError as error:
        raise UserError(f"demo needs {error.name}: pip install gradio") from error


def answer(pair: SideBySide, prompt: str, seed: int) -> list[Image.Image]:
    """An image of the prompt for each of `pair.roles`, from the same noise, enlarged to be seen.

    Raises:
        UserError: the prompt is empty.
    """
    if not prompt.strip():
        raise UserError("Type a prompt.")
    found = pair.images([prompt], [seed])
    return [_shown(to_pil(found[role, seed, 0])[0]) for role in pair.roles]


def page(pair: SideBySide, run: Path) -> Any:
    """The page, which is not served yet; samples are made one request at a time."""
    lock, library = threading.Lock(), gradio()

    def sample(prompt: str, seed: float) -> list[Image.Image]:
        try:
            with lock:
                return answer(pair, prompt, int(seed))
        except UserError as error:
            raise library.Error(str(error), print_exception=False) from error

    with library.Blocks(title=f"flowtilt: {run.name}", analytics_enabled=False) as application:
        library.Markdown(f"## {run.name}: base and tuned, from the same noise")
        with library.Row():
            prompt = library.Textbox(EXAMPLE, label="prompt", scale=4)
            seed = library.Number(0, label="seed", precision=0, minimum=0, scale=1)
            button = library.Button("Sample", variant="primary", scale=1)
        with library.Row():
            shots = [
                library.Image(label=role, type="pil", format="png", interactive=False, buttons=["download", "fullscreen"])
                for role in pair.roles
            ]
        library.on([application.load, button.click, prompt.submit], sample, [prompt, seed], shots, api_name="sample")
    return application


def _shown(image: Image.Image) -> Image.Image:
    zoom = max(1, SEEN // image.width)
    return image.resize((image.width * zoom, image.height * zoom), Image.Resampling.NEAREST)
