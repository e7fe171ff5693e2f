"""What families of diffusers pipelines have in common: one network to call, a VAE, sizes in pixels, a LoRA file."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from flowtilt.errors import UserError


def call(network: nn.Module, weights: Mapping[str, Tensor] | None, **inputs: Any) -> Tensor:
    """The network's first output in fp32, computed with `weights` in the place of its own, by name; a list of images is stacked."""
    inputs["return_dict"] = False
    # no layer that is replaced is another one's too, and to look for such takes a tenth of a small network's time
    found = (functional_call(network, dict(weights), (), inputs, tie_weights=False) if weights else network(**inputs))[0]
    return (torch.stack(found) if isinstance(found, list) else found).float()


def decode(vae: Any, latents: Tensor) -> Tensor:
    """Images [N, 3, H, W] fp32 in [0, 1] of latents as the VAE takes them; of a VAE of videos, the first frame."""
    images = vae.decode(latents.to(vae.dtype), return_dict=False)[0]
    images = images[:, :, 0] if images.ndim == 5 else images
    return on_white((images.float() / 2 + 0.5).clamp(0, 1))


def on_white(images: Tensor) -> Tensor:
    """[N, 3, H, W] of images in [0, 1], a fourth channel being their opacity."""
    return images if images.shape[1] == 3 else images[:, 3:] * images[:, :3] + (1 - images[:, 3:])


def check_resolution(size: int, multiple: int, largest: int | None = None) -> int:
    """Gives `size` back.

    Raises:
        UserError: it is not a multiple of what becomes one token, or larger than the network has positions for.
    """
    if largest and size > largest:
        raise UserError(f"model.resolution: {size} is beyond the {largest} that this network has positions for")
    if size % multiple:
        raise UserError(f"model.resolution: {size} is not a multiple of {multiple}")
    return size


def save_lora(pipeline: Any, folder: str, state: Mapping[str, Tensor], config: Mapping[str, object]) -> None:
    """Writes `pytorch_lora_weights.safetensors` for a pipeline whose network is its `transformer`; see `Model.save_lora`."""
    pipeline.save_lora_weights(folder, transformer_lora_layers=dict(state), transformer_lora_adapter_metadata=dict(config))
