"""The Stable Diffusion 3 family: SD3-Medium, SD3.5-Medium and -Large, and the playground.

SD3 (arXiv 2403.03206) reads three text encoders and predicts v at timestep 1000 t, a float that is
never rounded. Latents are fp32; the network computes in its own dtype and its velocity comes back fp32.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from diffusers.utils import logging as diffusers_logging
from torch import Tensor, nn

from flowtilt.errors import UserError
from flowtilt.models import pipeline as common
from flowtilt.models.captions import captions_of
from flowtilt.models.conditioning import Conditioning

T5_LENGTH = 128
"""DiffusionNFT's, in training and evaluation; diffusers' own default is 256."""


@contextmanager
def _no_truncation_warnings() -> Iterator[None]:
    """A T5 of one token, the playground's, says nothing; that captions do not fit into it is no news."""
    level = diffusers_logging.get_verbosity()
    diffusers_logging.set_verbosity_error()
    try:
        yield
    finally:
        diffusers_logging.set_verbosity(level)


class SD3:
    """An SD3 pipeline as a `Model`.

    Args:
        pipeline: as `load_pipeline` gives it; the network's device is where everything is computed.
        t5_length: tokens of the T5 prompt, 0 to 512; none takes 128, or what the T5 reads, or 0 without one.
        resolution: height and width in pixels; none takes the pipeline's own.
        offload: keep the embeddings of captions on disk, for text encoders that are not on the device.
    """

    # of the joint attention alone, as in the public checkpoints: SD3.5-Medium's second attention (attn2) stays as it is
    lora_targets: Sequence[str] = tuple(
        f"attn.{name}" for name in ("to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out")
    )

    def __init__(self, pipeline: Any, *, t5_length: int | None = None, resolution: int | None = None, offload: bool = False):
        if t5_length is None:
            t5_length = 0 if pipeline.text_encoder_3 is None else min(T5_LENGTH, pipeline.tokenizer_3.model_max_length)
        if t5_length == 0 and pipeline.text_encoder_3 is not None:
            raise UserError("model.t5_length: 0 would leave out this pipeline's T5; 128 is SD3.5-Medium's")
        self.pipeline = pipeline
        self.t5_length = t5_length
        self.network: Any = pipeline.transformer  # diffusers leaves its attributes untyped
        self.blocks: Sequence[nn.Module] = list(self.network.transformer_blocks)
        self.device: torch.device = self.network.device
        self._dtype: torch.dtype = self.network.dtype  # kept: asking the network walks over all of its parameters
        scale = pipeline.vae_scale_factor
        largest = scale * self.network.config.patch_size * self.network.config.pos_embed_max_size
        size = resolution or self.network.config.sample_size * scale
        self.resolution = common.check_resolution(size, scale * self.network.config.patch_size, largest)
        self.latent_shape: tuple[int, ...] = (self.network.config.in_channels, size // scale, size // scale)
        self.shift = float(pipeline.scheduler.config.shift)
        self.protocol: Mapping[str, object] = {"shift": self.shift, "resolution": size, "t5_length": t5_length}
        self.encode = captions_of(pipeline, self._encode, self.device, offload, t5_length, str(self._dtype))

    def _encode(self, text: str) -> dict[str, Tensor]:
        """As the pipeline's own `encode_prompt` makes it."""
        with _no_truncation_warnings() if self.t5_length == 1 else nullcontext():
            embeds, _, pooled, _ = self.pipeline.encode_prompt(
                [text], [text], [text], device=self.device, do_classifier_free_guidance=False, max_sequence_length=self.t5_length
            )
        return {"encoder_hidden_states": embeds[0], "pooled_projections": pooled[0]}

    def velocity(self, x: Tensor, t: Tensor, conditioning: Conditioning, weights: Mapping[str, Tensor] | None = None) -> Tensor:
        """v at x [N, C, h, w] and t [] or [N]; see `Model.velocity`."""
        return common.call(
            self.network,
            weights,
            hidden_states=x.to(self._dtype),
            timestep=(1000 * t).expand(len(x)),
            **{name: value.to(self._dtype) for name, value in conditioning.tensors().items()},
        )

    def decode(self, latents: Tensor) -> Tensor:
        """Images [N, 3, H, W] in [0, 1]."""
        return common.decode(self.pipeline.vae, latents)

    def call_options(self, guidance: float) -> Mapping[str, object]:
        """See `Model.call_options`."""
        size = {"height": self.resolution, "width": self.resolution}
        return {"guidance_scale": guidance, **size, "max_sequence_length": self.t5_length}

    def save_lora(self, folder: str, state: Mapping[str, Tensor], config: Mapping[str, object]) -> None:
        """Writes the LoRA in diffusers' format; see `Model.save_lora`."""
        common.save_lora(self.pipeline, folder, state, config)
