"""FLUX.1: -dev, whose network reads its guidance, and -schnell, whose network reads none.

Latents are [N, 16, H / 8, W / 8], as of every family; the network sees each 2 x 2 patch of them as one token
of 64 channels with its row and column. Time goes in as t in [0, 1]: the network multiplies it by 1000, in its
own precision. There is no paper; diffusers' FluxPipeline, whose images these are, stands for one.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from flowtilt.errors import UserError
from flowtilt.models.conditioning import Conditioning
from flowtilt.models.family import JOINT, Packed

GUIDANCE = 3.5
"""The pipeline's own default, and FlowGRPO's in training and evaluation: a LoRA is trained as it will be drawn with."""
T5_LENGTHS = {True: 512, False: 256}
"""Tokens of the T5 prompt by whether the network reads guidance: -dev's and -schnell's, as published."""


class Flux(Packed):
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
        *(f"attn.{name}" for name in JOINT),
        *("ff.net.0.proj", "ff.net.2", "ff_context.net.0.proj", "ff_context.net.2"),
    )
    block_lists = ("transformer_blocks", "single_transformer_blocks")
    encoders = ("text_encoder",)

    def __init__(
        self,
        pipeline: Any,
        *,
        t5_length: int | None = None,
        resolution: int | None = None,
        offload: bool = False,
        embedded_guidance: float | None = None,
    ):
        reads_guidance = pipeline.transformer.config.guidance_embeds
        if embedded_guidance is not None and not reads_guidance:
            raise UserError("model.options.embedded_guidance: this network reads none (guidance_embeds = false); leave it out")
        self.guidance = (GUIDANCE if embedded_guidance is None else float(embedded_guidance)) if reads_guidance else None
        if t5_length == 0 or pipeline.text_encoder_2 is None:
            raise UserError("model.t5_length: FLUX.1 reads its prompt through the T5, text_encoder_2; it can't be left out")
        self.t5_length = t5_length or min(T5_LENGTHS[reads_guidance], pipeline.tokenizer_2.model_max_length)
        super().__init__(pipeline, resolution=resolution, text_length=self.t5_length, offload=offload)
        told = {"resolution": self.resolution, "t5_length": self.t5_length, "embedded_guidance": self.guidance}
        self.protocol: Mapping[str, object] = {**self.levels.protocol(), **told}
        axes = (torch.arange(float(n), device=self.device) for n in (1, self.side // 2, self.side // 2))
        self._positions = torch.cartesian_prod(*axes)

    def read(self, text: str) -> dict[str, Tensor]:
        """As the pipeline's own `encode_prompt` makes it."""
        embeds, pooled, _ = self.pipeline.encode_prompt(text, device=self.device, max_sequence_length=self.t5_length)
        return {"encoder_hidden_states": embeds[0], "pooled_projections": pooled[0]}

    def blank(self, tokens: int) -> dict[str, Tensor]:
        """See `Family.blank`."""
        config = self.network.config
        words = self.empty(tokens, config.joint_attention_dim)
        return {"encoder_hidden_states": words, "pooled_projections": self.empty(config.pooled_projection_dim)}

    def inputs(self, x: Tensor, t: Tensor, conditioning: Conditioning) -> dict[str, Any]:
        """Tokens, captions, the embedded guidance, and where everything stands."""
        given = super().inputs(x, t, conditioning)
        guidance = None if self.guidance is None else torch.full((len(x),), self.guidance, device=x.device)
        text = self._positions.new_zeros(given["encoder_hidden_states"].shape[1], 3)
        return {**given, "guidance": guidance, "img_ids": self._positions, "txt_ids": text}

    def call_options(self, guidance: float) -> Mapping[str, object]:
        """See `Model.call_options`: the pipeline's `guidance_scale` is the embedded one, classifier-free guidance its `true_cfg_scale`."""
        options = {"height": self.resolution, "width": self.resolution, "max_sequence_length": self.t5_length}
        embedded = {} if self.guidance is None else {"guidance_scale": self.guidance}
        return options | embedded | ({} if guidance == 1 else {"true_cfg_scale": guidance, "negative_prompt": ""})
