"""Qwen-Image-2.1: a single-stream transformer that reads Qwen3-VL. Text to image; its editing of source images is not here.

The network sees latents as they are, a token each. Text stands before the image, so where the image stands depends on the caption's
length: captions of unlike length pass the network in turn, and an image depends on no other one of its batch. The VAE decodes colours
and opacity, which is laid on white.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from flowtilt.models.conditioning import Conditioning
from flowtilt.models.family import ATTENTION, Family
from flowtilt.models.levels import mu_by_tokens
from flowtilt.models.qwen_image import by_statistics, normalised

SLOT = 4
"""Latents for which the text encoder has one slot."""


class QwenImage21(Family):
    """A Qwen-Image-2.1 pipeline as a `Model`."""

    lora_targets = ATTENTION
    encoders = ("text_encoder", "processor")
    ragged = True
    row_by_row = True
    negative = " "
    one_by_one = True
    several_passes = True

    def __init__(self, pipeline: Any, *, resolution: int | None = None, offload: bool = False):
        super().__init__(pipeline, resolution=resolution, offload=offload)
        self.protocol = {name: value for name, value in self.protocol.items() if name != "text_length"}  # captions are not cut

    def read(self, text: str) -> dict[str, Tensor]:
        """The last layer's output for the caption's tokens, without the system message."""
        embeds, _, _ = self.pipeline.encode_prompt(text, device=self.device)
        return {"encoder_hidden_states": embeds[0]}

    def blank(self, tokens: int) -> dict[str, Tensor]:
        """See `Family.blank`."""
        return {"encoder_hidden_states": self.empty(tokens, self.network.config.context_in_dim)}

    def own_resolution(self) -> int:
        """The pipeline's default."""
        return 1024

    def velocity(self, x: Tensor, t: Tensor, conditioning: Conditioning, weights: Mapping[str, Tensor] | None = None) -> Tensor:
        """See `Model.velocity`; rows of equal length together."""
        tokens = torch.tensor(conditioning.tokens())
        if (tokens == tokens[0]).all():
            return super().velocity(x, t, conditioning, weights)
        groups = [(tokens == length).nonzero().flatten() for length in tokens.unique()]
        t = t.expand(len(x))
        parts = [super(QwenImage21, self).velocity(x[rows], t[rows], conditioning.select(rows), weights) for rows in groups]
        return torch.cat(parts)[torch.cat(groups).argsort().to(x.device)]

    def inputs(self, x: Tensor, t: Tensor, conditioning: Conditioning) -> dict[str, Any]:
        """Tokens, captions, the image's rows and columns, and which slots are the image's."""
        given = super().inputs(x, t, conditioning)
        words, slots = given["encoder_hidden_states"].shape[1], x.shape[1] // SLOT
        # the network reads these one by one in Python, which a tensor without numbers does not allow
        image = torch.arange(words + slots, device="cpu" if x.is_meta else x.device) >= words
        return {**given, "img_shapes": [[(1, self.side, self.side)]] * len(x), "img_mask": image.expand(len(x), -1)}

    def mu(self, steps: int) -> float:
        """Linear in the image's tokens, which are its latents."""
        return mu_by_tokens(self.pipeline.scheduler.config, self.side**2)

    def pack(self, x: Tensor) -> Tensor:
        """[N, C, h, w] as tokens [N, h w, C]."""
        return x.flatten(2).mT

    def unpack(self, v: Tensor) -> Tensor:
        """The image's tokens, the last ones, as [N, C, h, w]."""
        return v[:, -(self.side**2) :].mT.unflatten(2, self.latent_shape[1:])

    def unscaled(self, latents: Tensor) -> Tensor:
        """A video of one frame, by the VAE's own mean and deviation of each channel."""
        return by_statistics(self.pipeline.vae, latents)[:, :, None]

    def encode_images(self, images: Tensor) -> Tensor:
        """Latents [N, C, h, w] of opaque images [N, 3, H, W] in [0, 1]."""
        return normalised(self.pipeline.vae, torch.cat([images, torch.ones_like(images[:, :1])], 1))

    def call_options(self, guidance: float) -> Mapping[str, object]:
        """See `Model.call_options`: the pipeline's classifier-free guidance is its `true_cfg_scale`."""
        size = {"height": self.resolution, "width": self.resolution}
        return {**size, "true_cfg_scale": guidance, **({} if guidance == 1 else {"negative_prompt": self.negative})}
