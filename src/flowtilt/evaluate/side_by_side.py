"""`flowtilt sample`: the same prompt and noise, with and without LoRAs, by our own sampler."""

import itertools
from collections.abc import Sequence
from io import BytesIO
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from torch import Tensor

from flowtilt.build import EVALUATED_AT, default_evaluation, model_settings, recipe_of, sampler_of, vouch
from flowtilt.config.trust import of_model
from flowtilt.errors import UserError
from flowtilt.io.files import disk_errors, write_atomic, write_lines
from flowtilt.io.images import SHEET, sheet, to_pil
from flowtilt.io.labelled import Captioned, labelled
from flowtilt.models.cutting import notice_cut
from flowtilt.models.editing import check_sources, sources_beside
from flowtilt.models.opening import open_model
from flowtilt.policy.tuned import read_tuned
from flowtilt.prompts import Prompt
from flowtilt.sampling.sampler import decode
from flowtilt.seeding import noise, step_noise

FORMATS = {"": "PNG", ".png": "PNG", ".jpg": "JPEG", ".jpeg": "JPEG", ".webp": "WEBP"}
"""Endings of a file's name, and what Pillow calls them."""


Images = dict[tuple[str, int, int], Tensor]
"""[N, 3, H, W], an image per prompt, by role ("base", "tuned"), seed and copy."""


class SideBySide:
    """A base and what was trained on it, opened once; both start from the same noise.

    Several LoRAs add up, with their own base LoRAs. Model, steps, guidance, solver and eta default to those of the
    first LoRA's run, or of the one on top of it, else to the playground's.

    Args:
        base_too: also sample the base where there is a LoRA.
        resolution, dtype, t5_length, levels: keys of `[model]`. A model without a recipe is sampled at 512 pixels, or its own resolution
            where that is smaller.
        trust: the recipe beside the LoRA may run its own code; a run of this user may anyway.

    Raises:
        UserError: a model or LoRA that can't be loaded, an eta that the solver does not have, or a recipe of somebody else's that
            runs code.
    """

    def __init__(
        self,
        *,
        model: str | None = None,
        loras: Sequence[Path] = (),
        resolution: int | None = None,
        dtype: str | None = None,
        t5_length: int | None = None,
        levels: str | None = None,
        steps: int | None = None,
        guidance: float | None = None,
        solver: str | None = None,
        eta: float | None = None,
        base_too: bool = True,
        trust: bool = False,
    ):
        added = read_tuned(loras)
        recipe = recipe_of(added.leading) if added.leading else None
        e = recipe.evaluate if recipe else default_evaluation(model)
        self._sampler = sampler_of(e, solver=solver, steps=steps, guidance=guidance, eta=eta)
        settings = model_settings(model, recipe, resolution=resolution, dtype=dtype, t5_length=t5_length, levels=levels)
        if added.leading:
            vouch(added.leading, of_model(settings), trust)
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self._stack = added.on(open_model(settings, device, at_most=None if recipe else EVALUATED_AT))
        self.roles = (["base"] if base_too or not added else []) + (["tuned"] if added else [])

    def images(self, prompts: Sequence[str | Prompt], seeds: Sequence[int] = (0,), copies: int = 1, same_noise: bool = False) -> Images:
        """An image of each prompt for every role, seed and copy.

        Args:
            same_noise: start all prompts from one noise.
        """
        stack, model = self._stack, self._stack.model
        wanted = [Prompt(one) if isinstance(one, str) else one for one in prompts]
        check_sources(model, wanted)
        notice_cut(model, wanted)
        places = [(0 if same_noise else k,) for k in range(len(prompts))]
        given, found = model.encode([prompt.caption for prompt in wanted]), {}
        for seed, copy in itertools.product(seeds, range(copies)):
            purpose = f"sample {copy}" if copy else "sample"
            start = noise(seed, purpose, places, model.latent_shape).to(model.device)
            fresh = step_noise(seed, purpose, places, model.latent_shape)
            for role in self.roles:
                latents = self._sampler(stack, role, start, given, len(prompts), fresh)
                found[role, seed, copy] = decode(stack, latents, len(prompts)).cpu()
        return found


def sample(
    prompts: Sequence[str],
    output: Path | str,
    *,
    seeds: Sequence[int] = (0,),
    copies: int = 1,
    same_noise: bool = False,
    save_each: Path | None = None,
    images: Sequence[Path] = (),
    **options: Any,
) -> Path:
    """Samples each prompt with the base and the tuned model from the same noise, into one labelled picture; one image alone has no label.

    Args:
        output: PNG, JPEG or WebP, by the ending of its name; PNG without one.
        copies: images per prompt and seed.
        save_each: a folder for every image at its own size, with a table of their prompts that `flowtilt score --prompts` reads.
        images: source images for a model that edits: one for all prompts, or one for each.
        options: of `SideBySide`.

    Raises:
        UserError: as `SideBySide`, or a file that can't be written.
    """
    output = Path(output)
    kind = _format_of(output)
    wanted = _with_sources(prompts, images)
    found = SideBySide(**options).images(wanted, seeds, copies, same_noise)
    picture = contact_sheet(prompts, found, sources_beside(next(iter(found.values())), wanted))
    several = picture.size != next(iter(found.values())).shape[:-3:-1]  # or an enlarged one
    write_atomic(output, _encoded(picture, kind, output, f"{len(prompts)} x {len(found)}" if several else ""))
    if save_each:
        _save_each(prompts, found, save_each)
    return output


def _with_sources(texts: Sequence[str], images: Sequence[Path]) -> list[Prompt]:
    """Prompts with their source images, if any."""
    if len(images) not in (0, 1, len(texts)):
        raise UserError(f"--image: {len(images)} source images for {len(texts)} prompts; give one for all, or one for each")
    files = list(images) * (len(texts) if len(images) == 1 else 1)
    return [Prompt(text, image=str(file)) for text, file in zip(texts, files, strict=True)] if files else list(map(Prompt, texts))


def contact_sheet(prompts: Sequence[str], found: Images, sources: Tensor | None = None) -> Image.Image:
    """All images, under their prompts: base and tuned side by side, or a row of each where there are several of a prompt.

    The source image of an edit comes first.
    """
    if len(found) == len(prompts) == 1 and sources is None:
        return sheet(list(found.values()))
    seeds, copies = ({key[place] for key in found} for place in (1, 2))
    several = len(seeds) * len(copies) > 1

    def label(role: str, seed: int, copy: int) -> str:
        return ", ".join([role, *([f"seed {seed}"] if len(seeds) > 1 else []), *([f"image {copy + 1}"] if len(copies) > 1 else [])])

    blocks = []
    for k, prompt in enumerate(prompts):
        shots = {key: (label(*key), to_pil(images[k : k + 1])[0]) for key, images in found.items()}
        roles = dict.fromkeys(role for role, _, _ in found)
        rows = [[shot for key, shot in shots.items() if key[0] == role] for role in roles] if several else [list(shots.values())]
        if sources is not None:
            rows[0].insert(0, ("source", to_pil(sources[k : k + 1])[0]))
        blocks.append(Captioned(prompt, rows))
    return labelled(blocks)


def _save_each(prompts: Sequence[str], found: Images, folder: Path) -> None:
    """PNG files, and a line of JSON per image."""
    lines = []
    with disk_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
    for (role, seed, copy), images in found.items():
        for k, picture in enumerate(to_pil(images)):
            name = f"{k:03d}-{role}-seed{seed}-{copy}.png"
            buffer = BytesIO()
            picture.save(buffer, "PNG")
            write_atomic(folder / name, buffer.getvalue())
            lines.append({"file_name": name, "prompt": prompts[k], "variant": role, "seed": seed, "copy": copy})
    write_lines(folder / "metadata.jsonl", lines)


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
