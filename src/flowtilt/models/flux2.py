"""FLUX.2: -klein (4B and 9B), which reads Qwen3, and -dev, which reads Mistral 3 and its guidance.

Latents are those of the VAE in 2 x 2 patches, 128 channels, normalised by the running statistics of the VAE's batch norm. mu depends on
the image's tokens and on the number of steps. A caption is three hidden layers of its encoder, always padded to one length.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from diffusers.pipelines.flux2.pipeline_flux2_klein import compute_empirical_mu
from torch import Tensor
from torch.nn.functional import pad, pixel_shuffle

from flowtilt.errors import UserError
from flowtilt.models.conditioning import Conditioning
from flowtilt.models.family import JOINT, Family

GUIDANCE = 4.0
"""The default of -dev's pipeline."""


class Flux2Klein(Family):
    """A FLUX.2-klein pipeline as a `Model`.

    Its LoRA targets are the projections of the double blocks' joint attention and, in the single blocks, the one layer that makes
    queries, keys, values and the feed-forward, and the one after it.
    """

    lora_targets: Sequence[str] = (*(f"attn.{name}" for name in JOINT), "attn.to_qkv_mlp_proj")
    block_lists = ("transformer_blocks", "single_transformer_blocks")

    def prepare(self) -> None:
        """Where each patch stands, and by name the single blocks' `to_out`, which in double blocks is a list of modules."""
        single = (f"single_transformer_blocks.{k}.attn.to_out" for k in range(len(self.network.single_transformer_blocks)))
        self.lora_targets = (*self.lora_targets, *single)
        side = self.side // self.patch
        axes = (torch.arange(n, device=self.device) for n in (1, side, side, 1))
        self._positions = torch.cartesian_prod(*axes)

    def read(self, text: str) -> dict[str, Tensor]:
        """As the pipeline's own `encode_prompt` makes it."""
        embeds, _ = self.pipeline.encode_prompt(text, device=self.device, max_sequence_length=self.text_length)
        return {"encoder_hidden_states": embeds[0]}

    def blank(self, tokens: int) -> dict[str, Tensor]:
        """See `Family.blank`."""
        return {"encoder_hidden_states": self.empty(tokens, self.network.config.joint_attention_dim)}

    def inputs(self, x: Tensor, t: Tensor, conditioning: Conditioning) -> dict[str, Any]:
        """Tokens, captions, and where everything stands: frame, row, column, word."""
        given = super().inputs(x, t, conditioning)
        words = torch.arange(given["encoder_hidden_states"].shape[1], device=x.device)
        text = pad(words[:, None], (3, 0))
        return {**given, "guidance": self.embedded(x), "img_ids": self._positions, "txt_ids": text}

    def embedded(self, x: Tensor) -> Tensor | None:
        """The guidance that the network reads, [N]; klein's reads none."""
        return None

    def shape_of_latents(self) -> tuple[int, ...]:
        """Patches of 2 x 2 latents: all of the network's channels at half of the side."""
        return self.network.config.in_channels, self.side // 2, self.side // 2

    def pack(self, x: Tensor) -> Tensor:
        """[N, C, h, w] as tokens [N, h w, C]."""
        return x.flatten(2).mT

    def unpack(self, v: Tensor) -> Tensor:
        """Tokens as [N, C, h, w]."""
        return v.mT.unflatten(2, self.latent_shape[1:])

    def pipeline_latents(self, noise: Tensor) -> Tensor:
        """As they are: the pipeline packs them itself."""
        return noise

    def mu(self, steps: int) -> float:
        """The pipeline's, of tokens and steps."""
        return compute_empirical_mu((self.side // self.patch) ** 2, steps)

    def unscaled(self, latents: Tensor) -> Tensor:
        """By the batch norm's statistics, then out of their patches."""
        vae = self.pipeline.vae
        mean, variance = (x.view(1, -1, 1, 1).float() for x in (vae.bn.running_mean, vae.bn.running_var))
        return pixel_shuffle(latents * (variance + vae.config.batch_norm_eps).sqrt() + mean, 2)


class Flux2Dev(Flux2Klein):
    """A FLUX.2-dev pipeline as a `Model`.

    Args:
        embedded_guidance: what the network reads, in one pass; none takes 4. The pipeline has no classifier-free guidance, so
            a sampler's guidance other than 1 is ours alone.
    """

    guidable = False

    def __init__(
        self,
        pipeline: Any,
        *,
        resolution: int | None = None,
        text_length: int | None = None,
        offload: bool = False,
        embedded_guidance: float | None = None,
    ):
        self.guidance = GUIDANCE if embedded_guidance is None else float(embedded_guidance)
        super().__init__(pipeline, resolution=resolution, text_length=text_length, offload=offload)
        self.protocol = {**self.protocol, "embedded_guidance": self.guidance}

    def embedded(self, x: Tensor) -> Tensor:
        """The same for every image."""
        return torch.full((len(x),), self.guidance, device=x.device)

    def call_options(self, guidance: float) -> Mapping[str, object]:
        """See `Model.call_options`.

        Raises:
            UserError: classifier-free guidance, which a call of the pipeline can't have.
        """
        if guidance != 1:
            raise UserError("guidance: FLUX.2-dev has no classifier-free guidance; set it to 1 and use model.options.embedded_guidance")
        return {**super().call_options(guidance), "guidance_scale": self.guidance}
