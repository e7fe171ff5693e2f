"""FLUX.1: -dev, whose network reads its guidance, and -schnell, whose network reads none.

Latents are [N, 16, H / 8, W / 8], as of every family; the network sees each 2 x 2 patch of them as one token
of 64 channels with its row and column. Time goes in as t in [0, 1]: the network multiplies it by 1000, in its
own precision. There is no paper; diffusers' FluxPipeline, whose images these are, stands for one.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from diffusers.pipelines.flux.pipeline_flux import calculate_shift
from torch import Tensor, nn
from torch.nn.functional import pixel_shuffle, pixel_unshuffle

from flowtilt.errors import UserError
from flowtilt.models import pipeline as common
from flowtilt.models.captions import captions_of
from flowtilt.models.conditioning import Conditioning

GUIDANCE = 3.5
"""The pipeline's own default, and FlowGRPO's in training and evaluation: a LoRA is trained as it will be drawn with."""
T5_LENGTHS = {True: 512, False: 256}
"""Tokens of the T5 prompt by whether the network reads guidance: -dev's and -schnell's, as published."""


class Flux:
    """A FLUX.1 pipeline as a `Model`.

    Args:
        pipeline: as `load_pipeline` gives it; the network's device is where everything is computed.
        t5_length: tokens of the T5 prompt, 1 to 512; none takes 512, -schnell 256, or what the T5 reads.
        resolution: height and width in pixels; none takes the pipeline's own, 1024.
        offload: keep the embeddings of captions on disk, for text encoders that are not on the device.
        embedded_guidance: the guidance that -dev's network reads, in one pass; none takes 3.5. Classifier-free
            guidance, with a second pass, is the sampler's and goes beside it.

    Raises:
        UserError: settings that this pipeline can't have.
    """

    # what FlowGRPO and diffusers' own scripts adapt; the ends of attn.* are those of the single blocks, too
    lora_targets: Sequence[str] = (
        *(f"attn.{name}" for name in ("to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out")),
        *("ff.net.0.proj", "ff.net.2", "ff_context.net.0.proj", "ff_context.net.2"),
    )

    def __init__(
        self,
        pipeline: Any,
        *,
        t5_length: int | None = None,
        resolution: int | None = None,
        offload: bool = False,
        embedded_guidance: float | None = None,
    ):
        self.pipeline = pipeline
        self.network: Any = pipeline.transformer  # diffusers leaves its attributes untyped
        self.blocks: Sequence[nn.Module] = [*self.network.transformer_blocks, *self.network.single_transformer_blocks]
        self.device: torch.device = self.network.device
        self._dtype: torch.dtype = self.network.dtype  # kept: asking the network walks over all of its parameters
        reads_guidance = self.network.config.guidance_embeds
        if embedded_guidance is not None and not reads_guidance:
            raise UserError("model.options.embedded_guidance: this network reads none (guidance_embeds = false); leave it out")
        self.guidance = (GUIDANCE if embedded_guidance is None else float(embedded_guidance)) if reads_guidance else None
        if t5_length == 0 or pipeline.text_encoder_2 is None:
            raise UserError("model.t5_length: FLUX.1 reads its prompt through the T5, text_encoder_2; it can't be left out")
        self.t5_length = t5_length or min(T5_LENGTHS[reads_guidance], pipeline.tokenizer_2.model_max_length)
        scale = pipeline.vae_scale_factor
        self.resolution = common.check_resolution(resolution or pipeline.default_sample_size * scale, 2 * scale)
        side = self.resolution // scale
        self.latent_shape: tuple[int, ...] = (self.network.config.in_channels // 4, side, side)
        self.shift = _shift(pipeline.scheduler.config, (side // 2) ** 2)
        self.protocol: Mapping[str, object] = {
            "shift": self.shift,
            "resolution": self.resolution,
            "t5_length": self.t5_length,
            "embedded_guidance": self.guidance,
        }
        axes = (torch.arange(float(n), device=self.device) for n in (1, side // 2, side // 2))
        self._positions = torch.cartesian_prod(*axes)
        self.encode = captions_of(pipeline, self._encode, self.device, offload, self.t5_length, str(self._dtype))

    def _encode(self, text: str) -> dict[str, Tensor]:
        """As the pipeline's own `encode_prompt` makes it."""
        embeds, pooled, _ = self.pipeline.encode_prompt(text, device=self.device, max_sequence_length=self.t5_length)
        return {"encoder_hidden_states": embeds[0], "pooled_projections": pooled[0]}

    def velocity(self, x: Tensor, t: Tensor, conditioning: Conditioning, weights: Mapping[str, Tensor] | None = None) -> Tensor:
        """v at x [N, 16, h, w] and t [] or [N]; see `Model.velocity`."""
        given = conditioning.tensors()
        v = common.call(
            self.network,
            weights,
            hidden_states=pixel_unshuffle(x, 2).flatten(2).mT.to(self._dtype),
            timestep=t.expand(len(x)),
            guidance=None if self.guidance is None else x.new_full((len(x),), self.guidance),
            img_ids=self._positions,
            txt_ids=self._positions.new_zeros(given["encoder_hidden_states"].shape[1], 3),
            **{name: value.to(self._dtype) for name, value in given.items()},
        )
        return pixel_shuffle(v.mT.unflatten(2, (x.shape[2] // 2, x.shape[3] // 2)), 2)

    def decode(self, latents: Tensor) -> Tensor:
        """Images [N, 3, H, W] in [0, 1]."""
        return common.decode(self.pipeline.vae, latents)

    def call_options(self, guidance: float) -> Mapping[str, object]:
        """See `Model.call_options`: the pipeline's `guidance_scale` is the embedded one, classifier-free guidance its `true_cfg_scale`."""
        options = {"height": self.resolution, "width": self.resolution, "max_sequence_length": self.t5_length}
        embedded = {} if self.guidance is None else {"guidance_scale": self.guidance}
        return options | embedded | ({} if guidance == 1 else {"true_cfg_scale": guidance, "negative_prompt": ""})

    def save_lora(self, folder: str, state: Mapping[str, Tensor], config: Mapping[str, object]) -> None:
        """Writes the LoRA in diffusers' format; see `Model.save_lora`."""
        common.save_lora(self.pipeline, folder, state, config)


def _shift(config: Any, tokens: int) -> float:
    """The schedule's shift k for images of so many tokens.

    With dynamic shifting mu is linear in their number, and the levels e^mu / (e^mu + 1 / t - 1) are
    k t / (1 + (k - 1) t) with k = e^mu.
    """
    if not config.use_dynamic_shifting:
        return float(config.shift)
    return math.exp(calculate_shift(tokens, config.base_image_seq_len, config.max_image_seq_len, config.base_shift, config.max_shift))
