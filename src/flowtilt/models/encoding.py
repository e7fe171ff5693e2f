"""Latents of pictures: what a method needs that trains on images which it did not sample."""

from typing import Any

import torch
from torch import Tensor

from flowtilt.errors import UserError
from flowtilt.models.base import Model


@torch.no_grad()
def encode_images(model: Model, images: Tensor, *, checked: bool = True) -> Tensor:
    """Latents [N, *model.latent_shape] fp32 of images [N, 3, H, W] in [0, 1], as the network has them; the inverse of `model.decode`.

    (mode - shift_factor) scaling_factor, with the mode of the VAE's posterior: nothing is drawn. A family whose latents are made in
    another way brings a method `encode_images(images)`.

    Args:
        checked: they must be of the size that the network samples.

    Raises:
        UserError: the VAE encodes no images, or gives latents of another shape.
    """
    own = getattr(model, "encode_images", None)
    latents = own(images) if own else _encode(model.pipeline.vae, images)
    if checked and latents.shape[1:] != torch.Size(model.latent_shape):
        raise UserError(
            f"model: the VAE makes latents {list(latents.shape[1:])} of images {list(images.shape[1:])}, but the network reads "
            f"{list(model.latent_shape)}; its adapter needs a method encode_images"
        )
    return latents


def _encode(vae: Any, images: Tensor) -> Tensor:
    scale = getattr(vae.config, "scaling_factor", None)
    posterior = getattr(vae.encode((2 * images - 1).to(vae.device, vae.dtype)), "latent_dist", None)
    if scale is None or posterior is None:
        raise UserError(f"model: a {type(vae).__name__} has no scaling_factor or no posterior; its adapter needs a method encode_images")
    return (posterior.mode().float() - (vae.config.shift_factor or 0)) * scale
