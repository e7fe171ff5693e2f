"""`flowtilt sample`: the same prompt and noise, with and without LoRAs, by our own sampler."""

from collections.abc import Sequence
from io import BytesIO
from pathlib import Path

import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from torch import Tensor

from flowtilt.files import write_atomic
from flowtilt.lora.stacked import leading, read_stack
from flowtilt.models.cutting import notice_cut
from flowtilt.models.opening import open_model
from flowtilt.pictures import SHEET, to_pil
from flowtilt.prompts import Prompt
from flowtilt.rollout import decode, sampler_of
from flowtilt.seeding import noise, step_noise
from flowtilt.stack import Stack, default_evaluation, model_settings, recipe_of


def sample(
    prompts: Sequence[str],
    output: Path | str,
    *,
    model: str | None = None,
    loras: Sequence[Path] = (),
    seed: int = 0,
    steps: int | None = None,
    guidance: float | None = None,
    solver: str | None = None,
    eta: float | None = None,
    same_noise: bool = False,
    base_too: bool = True,
) -> Path:
    """Draws each prompt as one row, the base left and the tuned model right, from the same noise, into a PNG.

    Several LoRAs add up, with what lies beneath them. Model, steps, guidance, solver and eta default to those of the
    first LoRA's run, or of the one on top of it, else to the playground's.

    Raises:
        UserError: a model or LoRA that can't be loaded, an eta that the solver does not have, or a file that can't be written.
    """
    added, output = read_stack(loras), Path(output)
    recipe = recipe_of(leading(added)) if added else None
    e = recipe.evaluate if recipe else default_evaluation(model)
    sampler = sampler_of(e, solver=solver, steps=steps, guidance=guidance, eta=eta)
    settings = model_settings(model, recipe)
    stack = Stack(open_model(settings, torch.device("cuda" if torch.cuda.is_available() else "cpu")), added)
    notice_cut(stack.model, [Prompt(text) for text in prompts])
    places = [(0 if same_noise else k,) for k in range(len(prompts))]
    start = noise(seed, "sample", places, stack.model.latent_shape).to(stack.model.device)
    fresh = step_noise(seed, "sample", places, stack.model.latent_shape)
    given = stack.model.encode(prompts)
    roles = (["base"] if base_too or not added else []) + (["tuned"] if added else [])
    columns = [decode(stack, sampler(stack, role, start, given, len(prompts), fresh), len(prompts)) for role in roles]
    picture = BytesIO()
    sheet = _sheet(columns)
    info = PngInfo()
    if sheet.size != columns[0].shape[:-3:-1]:  # several images, or an enlarged one
        info.add_text(SHEET, f"{len(columns[0])} x {len(columns)}")
    sheet.save(picture, format="PNG", pnginfo=info)
    write_atomic(output, picture.getvalue())
    return output


def _sheet(columns: Sequence[Tensor]) -> Image.Image:
    """Columns of images [N, 3, H, W] as one picture; tiny ones are enlarged to be seen."""
    gap = 0 if len(columns) == 1 and len(columns[0]) == 1 else 4
    _, _, height, width = columns[0].shape
    zoom = max(1, 256 // width)
    sheet = Image.new("RGB", (len(columns) * (width * zoom + gap) - gap, len(columns[0]) * (height * zoom + gap) - gap), "white")
    for c, column in enumerate(columns):
        for r, picture in enumerate(to_pil(column)):
            tile = picture.resize((width * zoom, height * zoom), Image.Resampling.NEAREST)
            sheet.paste(tile, (c * (width * zoom + gap), r * (height * zoom + gap)))
    return sheet
