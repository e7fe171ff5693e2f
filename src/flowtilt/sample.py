"""`flowtilt sample`: the same prompt and noise, with and without a LoRA, by our own sampler."""

from collections.abc import Sequence
from io import BytesIO
from pathlib import Path

import torch
from PIL import Image
from safetensors import SafetensorError, safe_open
from torch import Tensor

from flowtilt.config import ModelSettings, Recipe, load_recipe
from flowtilt.errors import UserError
from flowtilt.files import write_atomic
from flowtilt.flow import sigma_schedule
from flowtilt.models.sd3 import SD3, load_pipeline
from flowtilt.seeding import noise
from flowtilt.solvers import solve

LORA_FILE = "pytorch_lora_weights.safetensors"


def find_lora(place: Path) -> Path:
    """The weights file of a run, a lora folder or a file.

    Raises:
        UserError: there is none.
    """
    for candidate in (place, place / LORA_FILE, place / "lora" / LORA_FILE):
        if candidate.is_file():
            return candidate
    raise UserError(f"lora {place}: no {LORA_FILE} there; give a run, its lora folder, or a .safetensors file")


def recipe_of(place: Path) -> Recipe | None:
    """The recipe of the run that a LoRA lies in, none for one from elsewhere."""
    for folder in (place, *list(place.resolve().parents)[:2]):
        if (folder / "recipe.toml").is_file():
            return load_recipe(folder / "recipe.toml")
    return None


def add_lora(model: SD3, file: Path, name: str) -> None:
    """Loads a diffusers LoRA file as an adapter.

    Raises:
        UserError: the file is broken, or one of its tensors belongs to no layer of this model.
    """
    try:
        with safe_open(file, "pt") as opened:
            shapes = {key: tuple(opened.get_slice(key).get_shape()) for key in opened.keys()}  # noqa: SIM118 - not a dict
    except (SafetensorError, OSError) as error:
        raise UserError(f"lora {file}: not a readable safetensors file ({error})") from None
    layers = {name.replace(".base_layer", ""): tuple(p.shape) for name, p in model.network.named_parameters() if ".lora_" not in name}
    known = 0
    for key, shape in shapes.items():
        layer, _, part = key.removeprefix("transformer.").partition(".lora_")
        target = layers.get(f"{layer}.weight")
        side = {"A.weight": 1, "B.weight": 0}.get(part)
        if side is None or target is None or not key.startswith("transformer."):
            continue
        if shape[side] != target[side]:
            raise UserError(f"lora {file}: {key} is {list(shape)}, but the layer is {list(target)}; it belongs to another base")
        known += 1
    if known == 0 or known != len([key for key in shapes if ".lora_" in key]) or not shapes:
        first = next(iter(shapes), "nothing in it")
        raise UserError(
            f"lora {file}: {known} of {len(shapes)} tensors fit this model (first: {first}); it belongs to another base or format"
        )
    model.pipeline.load_lora_weights(str(file.parent), weight_name=file.name, adapter_name=name)


@torch.no_grad()
def draw(model: SD3, prompts: Sequence[str], *, seed: int, steps: int, guidance: float, solver: str, same_noise: bool) -> Tensor:
    """Images [N, 3, H, W] in [0, 1]; image k starts from noise (seed, k), or all from (seed, 0)."""
    start = noise(seed, "sample", [(0 if same_noise else k,) for k in range(len(prompts))], model.latent_shape).to(model.device)
    given = model.encode(prompts)
    free = model.encode([""] * len(prompts)) if guidance != 1 else None

    def velocity(x: Tensor, sigma: Tensor) -> Tensor:
        v = model.velocity(x, sigma, given)
        if free is None:
            return v
        v_free = model.velocity(x, sigma, free)
        return v_free + guidance * (v - v_free)

    return model.decode(solve(velocity, start, sigma_schedule(steps, model.shift), solver))


def sample(
    prompts: Sequence[str],
    output: Path,
    *,
    model: str | None = None,
    loras: Sequence[Path] = (),
    seed: int = 0,
    steps: int | None = None,
    guidance: float | None = None,
    solver: str | None = None,
    same_noise: bool = False,
    base_too: bool = True,
) -> Path:
    """Draws each prompt as one row, the base left and the tuned model right, from the same noise, into a PNG.

    Several LoRAs add up. Model, steps, guidance and solver default to those of the first LoRA's run, else
    to the playground's.

    Raises:
        UserError: a model or LoRA that can't be loaded, or a file that can't be written.
    """
    files = [find_lora(place) for place in loras]
    recipe = (recipe_of(loras[0]) if loras else None) or load_recipe("playground")
    settings = recipe.model if model in (None, recipe.model.path) else ModelSettings(path=str(model))
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    pipeline = load_pipeline(settings.path, revision=settings.revision, dtype=settings.dtype, device=device)
    loaded = SD3(pipeline, t5_length=settings.t5_length, resolution=settings.resolution)
    options = {
        "seed": seed,
        "steps": steps or recipe.evaluate.steps,
        "guidance": recipe.evaluate.guidance if guidance is None else guidance,
        "solver": solver or recipe.evaluate.solver,
        "same_noise": same_noise,
    }
    columns = [draw(loaded, prompts, **options)] if base_too or not files else []
    for k, file in enumerate(files):
        add_lora(loaded, file, f"lora{k}")
    if files:
        loaded.pipeline.set_adapters([f"lora{k}" for k in range(len(files))])
        columns.append(draw(loaded, prompts, **options))
    picture = BytesIO()
    _sheet(columns).save(picture, format="PNG")
    write_atomic(output, picture.getvalue())
    return output


def _sheet(columns: Sequence[Tensor]) -> Image.Image:
    """Columns of images [N, 3, H, W] as one picture; tiny ones are enlarged to be seen."""
    gap = 0 if len(columns) == 1 and len(columns[0]) == 1 else 4
    _, _, height, width = columns[0].shape
    zoom = max(1, 256 // width)
    sheet = Image.new("RGB", (len(columns) * (width * zoom + gap) - gap, len(columns[0]) * (height * zoom + gap) - gap), "white")
    for c, column in enumerate(columns):
        for r, image in enumerate((column * 255).round().byte().permute(0, 2, 3, 1).cpu().numpy()):
            tile = Image.fromarray(image).resize((width * zoom, height * zoom), Image.Resampling.NEAREST)
            sheet.paste(tile, (c * (width * zoom + gap), r * (height * zoom + gap)))
    return sheet
