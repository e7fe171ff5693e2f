"""What was trained, saved and loaded in stock diffusers: does it draw the same image?"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from flowtilt.config import ModelSettings, Recipe
from flowtilt.errors import UserError
from flowtilt.lora import Lora, join
from flowtilt.lora.read import read_lora
from flowtilt.lora.write import to_diffusers
from flowtilt.models.opening import load_pipeline
from flowtilt.models.stock import stock_images
from flowtilt.policy.roles import Policy
from flowtilt.sampling.sampler import Sampler, decode
from flowtilt.seeding import generator, noise

CAPTION = "a photograph of a red bus beside a tree"
STEPS = 4
SEEN = 0.02
"""Mean change of a pixel in [0, 1] from which a LoRA counts as seen."""
SHARE = 0.25
"""Of the LoRA's change, how much the two images may differ: half precision rounds in other places there."""


@dataclass(frozen=True)
class Trained:
    """What was saved in `folder`, and what it draws here.

    Args:
        change: mean change of a pixel by it.
        noise, options: for a call of the stock pipeline.
    """

    folder: Path
    settings: ModelSettings
    whole: bool
    image: Tensor
    change: float
    noise: Tensor
    options: Mapping[str, object]
    shift: float
    dtype: torch.dtype


@torch.no_grad()
def set_apart(policy: Policy, recipe: Recipe, below: Sequence[Lora], folder: Path) -> Trained:
    """Makes the trained weights visible in an image, saves them and samples with them.

    Raises:
        UserError: they change nothing.
    """
    model, whole = policy.model, recipe.train == "full"
    start = noise(recipe.seed, "check", [(0,)], model.latent_shape).to(model.device)
    given = model.encode([CAPTION])

    def drawn(role: str) -> Tensor:
        return decode(policy, Sampler("euler", STEPS)(policy, role, start, given, 1), 1)

    plain, image, change = drawn("teacher"), drawn("ema"), 0.0
    fresh = policy.state("ema")
    for power in range(1, 8):
        policy.load_state("ema", _louder(fresh, 0.002 * 3**power, whole))
        image = drawn("ema")
        change = float((image - plain).abs().mean())
        if change > SEEN:
            break
    if not change > SEEN:
        raise UserError(f"what is trained changes an image by {change:.1e} alone; are lora.rank and lora.alpha as you mean them?")
    policy.save(str(folder))
    if below:
        to_diffusers(join([*below, read_lora(folder)]), folder)
    return Trained(
        folder, recipe.model, whole, image, change, model.pipeline_latents(start).cpu(), dict(model.call_options(1.0)),
        model.levels.shift(STEPS), model.network.dtype,
    )  # fmt: skip


def _louder(state: Mapping[str, Tensor], scale: float, whole: bool) -> dict[str, Tensor]:
    """The weights with noise: on B of LoRAs, whose A is there from the start, or relative to each matrix."""
    found = {}
    for number, (name, x) in enumerate(state.items()):
        if name.endswith("lora_B.weight") or (whole and x.ndim == 2):
            unit = x.std() if whole else 1.0
            x = x + scale * unit * torch.randn(x.shape, generator=generator(0, "check", number))
        found[name] = x
    return found


def compared(saved: Trained, device: torch.device) -> str:
    """Loads the base and what was saved in stock diffusers; says how far its image is from ours.

    Raises:
        UserError: too far, or it can't be loaded there.
    """
    dtype = str(saved.dtype).removeprefix("torch.")
    pipeline = load_pipeline(saved.settings.path, revision=saved.settings.revision, dtype=dtype, device=device)
    try:
        if saved.whole:
            network: Any = type(pipeline.transformer).from_pretrained(saved.folder, torch_dtype=saved.dtype)
            pipeline.transformer = network.to(device)
        else:
            pipeline.load_lora_weights(str(saved.folder))
    except (ValueError, KeyError, RuntimeError, OSError) as error:
        raise UserError(f"stock diffusers can't load what was saved: {error}; please report it with `flowtilt doctor`'s output") from error
    pipeline.to(dtype=saved.dtype)
    stock = saved.settings.levels == "stock"
    theirs = stock_images(pipeline, [CAPTION], saved.noise.to(device, saved.dtype), STEPS, saved.shift, saved.options, stock=stock)
    off = float((theirs - saved.image).abs().mean())
    if not off <= SHARE * saved.change:
        raise UserError(
            f"stock diffusers draws another image: it differs by {off:.3f} per pixel, where the LoRA changes {saved.change:.3f}; "
            "please report it with `flowtilt doctor`'s output"
        )
    return f"stock diffusers draws the same image: {off:.4f} per pixel apart, of {saved.change:.3f} that it changes"
