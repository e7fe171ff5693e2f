"""The Stable Diffusion 3 family: SD3-Medium, SD3.5-Medium and -Large, and the playground.

SD3 (arXiv 2403.03206) reads three text encoders and predicts v at timestep 1000 t, a float that is
never rounded. Latents are fp32; the network computes in its own dtype and its velocity comes back fp32.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

from diffusers.utils import logging as diffusers_logging
from torch import Tensor

from flowtilt.errors import UserError
from flowtilt.models.family import JOINT, Family

T5_LENGTH = 128
"""DiffusionNFT's, in training and the evaluations of a run; its evaluation script and diffusers read 256."""


@contextmanager
def _no_truncation_warnings() -> Iterator[None]:
    """A T5 of one token, the playground's, says nothing; that captions do not fit into it is no news."""
    level = diffusers_logging.get_verbosity()
    diffusers_logging.set_verbosity_error()
    try:
        yield
    finally:
        diffusers_logging.set_verbosity(level)


class SD3(Family):
    """An SD3 pipeline as a `Model`.

    Args:
        pipeline: as `load_pipeline` gives it; the network's device is where everything is computed.
        t5_length: tokens of the T5 prompt, 0 to 512; none takes 128, or what the T5 reads, or 0 without one.
        resolution: height and width in pixels; none takes the pipeline's own.
        offload: keep the embeddings of captions on disk, for text encoders that are not on the device.
    """

    # of the joint attention alone, as in the public checkpoints: SD3.5-Medium's second attention (attn2) stays as it is
    lora_targets: Sequence[str] = tuple(f"attn.{name}" for name in JOINT)
    encoders = ("text_encoder", "text_encoder_2")
    least_text = 0

    def __init__(self, pipeline: Any, *, t5_length: int | None = None, resolution: int | None = None, offload: bool = False):
        if t5_length is None:
            t5_length = 0 if pipeline.text_encoder_3 is None else min(T5_LENGTH, pipeline.tokenizer_3.model_max_length)
        if t5_length == 0 and pipeline.text_encoder_3 is not None:
            raise UserError("model.t5_length: 0 would leave out this pipeline's T5; 128 is SD3.5-Medium's")
        self.t5_length = t5_length
        super().__init__(pipeline, resolution=resolution, text_length=t5_length, offload=offload)
        self.protocol: Mapping[str, object] = {**self.levels.protocol(), "resolution": self.resolution, "t5_length": t5_length}

    def own_resolution(self) -> int:
        """The network's sample size in pixels."""
        return self.network.config.sample_size * self.scale

    def largest_resolution(self) -> int:
        """That of the table of positions."""
        return self.scale * self.network.config.patch_size * self.network.config.pos_embed_max_size

    def time(self, t: Tensor) -> Tensor:
        """1000 t, never rounded."""
        return 1000 * t

    def read(self, text: str) -> dict[str, Tensor]:
        """As the pipeline's own `encode_prompt` makes it."""
        with _no_truncation_warnings() if self.t5_length == 1 else nullcontext():
            embeds, _, pooled, _ = self.pipeline.encode_prompt(
                [text], [text], [text], device=self.device, do_classifier_free_guidance=False, max_sequence_length=self.t5_length
            )
        return {"encoder_hidden_states": embeds[0], "pooled_projections": pooled[0]}

    def blank(self, tokens: int) -> dict[str, Tensor]:
        """See `Family.blank`."""
        config, clip = self.network.config, self.pipeline.tokenizer_max_length
        words = self.empty(clip + tokens, config.joint_attention_dim)
        return {"encoder_hidden_states": words, "pooled_projections": self.empty(config.pooled_projection_dim)}
