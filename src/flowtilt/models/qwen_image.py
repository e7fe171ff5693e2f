"""Qwen-Image and Qwen-Image-2512 (arXiv 2508.02324): a 20B joint transformer that reads Qwen2.5-VL.

Captions keep their own lengths and come with a mask. The VAE is one of videos with statistics per channel. Guidance is rescaled to
the norm of the conditional prediction, token by token; the negative caption is one space.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from flowtilt.models.conditioning import Conditioning
from flowtilt.models.family import Packed
from flowtilt.models.guidance import rescaled


class QwenImage(Packed):
    """A Qwen-Image pipeline as a `Model`; its LoRA targets are the eight projections of each joint attention."""

    longest_text = 1024
    ragged = True
    row_by_row = True
    negative = " "

    def read(self, text: str) -> dict[str, Tensor]:
        """The last hidden states of the caption's own tokens, without the template's."""
        embeds, _ = self.pipeline.encode_prompt(text, device=self.device, max_sequence_length=self.text_length)
        return {"encoder_hidden_states": embeds[0]}

    def blank(self, tokens: int) -> dict[str, Tensor]:
        """See `Family.blank`."""
        return {"encoder_hidden_states": self.empty(tokens, self.network.config.joint_attention_dim)}

    def inputs(self, x: Tensor, t: Tensor, conditioning: Conditioning) -> dict[str, Any]:
        """Tokens, captions with their mask, and the image's rows and columns."""
        shape = [[(1, self.side // 2, self.side // 2)]] * len(x)
        mask = conditioning.mask(x.device)
        return {**super().inputs(x, t, conditioning), "encoder_hidden_states_mask": mask, "img_shapes": shape}

    def guide(self, v: Tensor, free: Tensor, guidance: float) -> Tensor:
        """Linear, then rescaled to the norm of each token of v."""
        return self.unpack(rescaled(self.pack(v), self.pack(free), guidance))

    def unscaled(self, latents: Tensor) -> Tensor:
        """A video of one frame, by the VAE's own mean and deviation of each channel."""
        return by_statistics(self.pipeline.vae, latents)[:, :, None]

    def encode_images(self, images: Tensor) -> Tensor:
        """Latents [N, C, h, w] of images [N, 3, H, W] in [0, 1]: the mode of the VAE's posterior, by its mean and deviation."""
        return normalised(self.pipeline.vae, images)

    def call_options(self, guidance: float) -> Mapping[str, object]:
        """See `Model.call_options`: the pipeline's classifier-free guidance is its `true_cfg_scale`."""
        size = {"height": self.resolution, "width": self.resolution, "max_sequence_length": self.text_length}
        return {**size, "true_cfg_scale": guidance, **({} if guidance == 1 else {"negative_prompt": self.negative})}


def by_statistics(vae: Any, latents: Tensor) -> Tensor:
    """Latents [N, C, h, w] times the VAE's `latents_std` plus its `latents_mean`, channel by channel."""
    mean, std = _statistics(vae, latents.device)
    return latents * std + mean


def normalised(vae: Any, images: Tensor) -> Tensor:
    """The inverse: the mode of the posterior of images [N, C, H, W] in [0, 1] as videos of one frame, minus mean, by deviation."""
    latents = vae.encode((2 * images - 1).to(vae.device, vae.dtype)[:, :, None]).latent_dist.mode()[:, :, 0].float()
    mean, std = _statistics(vae, latents.device)
    return (latents - mean) / std


def _statistics(vae: Any, device: torch.device) -> tuple[Tensor, Tensor]:
    mean, std = (torch.tensor(values, device=device).view(1, -1, 1, 1) for values in (vae.config.latents_mean, vae.config.latents_std))
    return mean, std
