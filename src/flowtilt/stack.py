"""LoRAs on a pipeline, for drawing: "tuned" adds all of them up, "base" is without any."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor

from flowtilt.config import EvaluateSettings, ModelSettings, Recipe, load_recipe
from flowtilt.errors import UserError
from flowtilt.models.base import Conditioning
from flowtilt.models.sd3 import SD3, load_pipeline

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


def model_settings(path: str | None, recipe: Recipe | None, resolution: int | None = None) -> ModelSettings:
    """The model of that path (none is the recipe's own, else the playground), otherwise as in the recipe of its LoRA.

    Args:
        resolution: instead of the recipe's.
    """
    settings = recipe.model if recipe else ModelSettings(path="playground")
    if path not in (None, settings.path):
        settings = settings.model_copy(update={"path": path, "revision": None})
    return settings if resolution is None else settings.model_copy(update={"resolution": resolution})


def open_model(settings: ModelSettings, device: torch.device) -> SD3:
    """Loads a model."""
    pipeline = load_pipeline(settings.path, revision=settings.revision, dtype=settings.dtype, device=device)
    return SD3(pipeline, t5_length=settings.t5_length, resolution=settings.resolution)


def default_evaluation(path: str | None) -> EvaluateSettings:
    """How a model without a recipe is evaluated: the playground as its recipe says, any other as DiffusionNFT does."""
    return load_recipe("playground").evaluate if path in (None, "playground") else EvaluateSettings()


class Stack:
    """A model with LoRAs.

    On an fp32 base the sum is merged exactly as `Policy` merges, so that a run's LoRA draws the same bits
    here as in training; on a half-precision base PEFT's layers add it to each activation.

    Args:
        model: its network gets the adapters.
        files: diffusers LoRA files.

    Raises:
        UserError: a file is broken, or one of its tensors belongs to no layer of this model.
    """

    def __init__(self, model: SD3, files: Sequence[Path]):
        self.model = model
        names = [f"lora{k}" for k in range(len(files))]
        for name, file in zip(names, files, strict=True):
            add_lora(model, file, name)
        if files:
            model.pipeline.set_adapters(names)
        # PEFT types its layers as bare modules
        self._layers: dict[str, Any] = {name: m for name, m in model.network.named_modules() if isinstance(m, LoraLayer)}
        self._weights = self._merged(names) if model.network.dtype == torch.float32 else {}
        self._activate(False)

    @torch.no_grad()
    def _merged(self, names: Sequence[str]) -> dict[str, Tensor]:
        found = {}
        for place, layer in self._layers.items():
            weight = layer.base_layer.weight
            for name in (name for name in names if name in layer.lora_A):
                a, b = layer.lora_A[name].weight.float(), layer.lora_B[name].weight.float()
                weight = torch.addmm(weight, b, a, alpha=layer.scaling[name])
            found[f"{place}.base_layer.weight"] = weight
        return found

    def _activate(self, on: bool) -> None:
        for layer in self._layers.values():
            layer.enable_adapters(on)

    def velocity(self, role: str, x_t: Tensor, t: Tensor, conditioning: Conditioning) -> Tensor:
        """v [N, ...] fp32 of "tuned" or "base" at x_t [N, ...] and t [] or [N]."""
        if role == "base" or self._weights:
            return self.model.velocity(x_t, t, conditioning, self._weights if role == "tuned" else None)
        self._activate(True)
        try:
            return self.model.velocity(x_t, t, conditioning)
        finally:
            self._activate(False)


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
    # diffusers rounds them to the network's dtype, training does not
    exact = load_file(file)
    for place, layer in model.network.named_modules():
        if isinstance(layer, LoraLayer) and name in layer.lora_A:
            for part in ("lora_A", "lora_B"):
                weight = getattr(layer, part)[name].weight
                weight.data = exact[f"transformer.{place}.{part}.weight"].float().to(weight.device)
