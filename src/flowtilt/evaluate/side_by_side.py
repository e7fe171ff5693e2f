"""`flowtilt sample`: the same prompt and noise, with and without LoRAs, by our own sampler."""

from collections.abc import Sequence
from io import BytesIO
from pathlib import Path

import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from flowtilt.build import default_evaluation, model_settings, recipe_of, sampler_of, vouch
from flowtilt.config.trust import of_model
from flowtilt.errors import UserError
from flowtilt.io.files import write_atomic
from flowtilt.io.images import SHEET, sheet
from flowtilt.models.cutting import notice_cut
from flowtilt.models.opening import open_model
from flowtilt.policy.tuned import read_tuned
from flowtilt.prompts import Prompt
from flowtilt.sampling.sampler import decode
from flowtilt.seeding import noise, step_noise

FORMATS = {"": "PNG", ".png": "PNG", ".jpg": "JPEG", ".jpeg": "JPEG", ".webp": "WEBP"}
"""Endings of a file's name, and what Pillow calls them."""


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
    trust: bool = False,
) -> Path:
    """Samples each prompt as one row, the base left and the tuned model right, from the same noise, into one picture.

    Several LoRAs add up, with what lies beneath them. Model, steps, guidance, solver and eta default to those of the
    first LoRA's run, or of the one on top of it, else to the playground's.

    Args:
        output: PNG, JPEG or WebP, by the ending of its name; PNG without one.
        trust: the recipe that lies with the LoRA may run its own code; a run of this user's may anyway.

    Raises:
        UserError: a model or LoRA that can't be loaded, an eta that the solver does not have, a recipe of somebody else's that
            runs code, or a file that can't be written.
    """
    output = Path(output)
    kind = _format_of(output)
    added = read_tuned(loras)
    recipe = recipe_of(added.leading) if added.leading else None
    e = recipe.evaluate if recipe else default_evaluation(model)
    sampler = sampler_of(e, solver=solver, steps=steps, guidance=guidance, eta=eta)
    settings = model_settings(model, recipe)
    if added.leading:
        vouch(added.leading, of_model(settings), trust)
    stack = added.on(open_model(settings, torch.device("cuda" if torch.cuda.is_available() else "cpu")))
    notice_cut(stack.model, [Prompt(text) for text in prompts])
    places = [(0 if same_noise else k,) for k in range(len(prompts))]
    start = noise(seed, "sample", places, stack.model.latent_shape).to(stack.model.device)
    fresh = step_noise(seed, "sample", places, stack.model.latent_shape)
    given = stack.model.encode(prompts)
    roles = (["base"] if base_too or not added else []) + (["tuned"] if added else [])
    columns = [decode(stack, sampler(stack, role, start, given, len(prompts), fresh), len(prompts)) for role in roles]
    image = sheet(columns)
    several = image.size != columns[0].shape[:-3:-1]  # or an enlarged one
    write_atomic(output, _encoded(image, kind, output, f"{len(columns[0])} x {len(columns)}" if several else ""))
    return output


def _format_of(file: Path) -> str:
    """Pillow's name of the format that a file's name asks for."""
    suffix = file.suffix.lower()
    if suffix not in FORMATS:
        raise UserError(f"-o {file}: can't write {suffix} files; choose one of {', '.join(filter(None, FORMATS))}")
    return FORMATS[suffix]


def _encoded(picture: Image.Image, kind: str, file: Path, tiles: str) -> bytes:
    """The picture's file; a PNG of several images says so by `tiles`, so that `flowtilt score` knows it."""
    encoded, info = BytesIO(), PngInfo()
    if tiles:
        info.add_text(SHEET, tiles)
    try:
        picture.save(encoded, format=kind, **({"pnginfo": info} if kind == "PNG" else {"quality": 95}))
    except (OSError, ValueError) as error:  # JPEG and WebP have a greatest size
        size = f"{picture.width} x {picture.height} pixels"
        raise UserError(f"-o {file}: {size} can't be written as {kind} ({error}); write a .png, or fewer prompts at once") from error
    return encoded.getvalue()
