"""SANA (arXiv 2410.10629): a linear transformer on latents of a deep-compression autoencoder, 32-fold, which reads Gemma 2.

An instruction stands before every caption but the negative one. The published scheduler is a DPM solver at integer timesteps; here
the same shift is used without rounding, so images differ from the stock defaults. The pipeline's resolution binning is turned off.
"""

import inspect
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from flowtilt.models.captions import captions_of
from flowtilt.models.conditioning import Conditioning
from flowtilt.models.family import ATTENTION, Family


class Sana(Family):
    """A SANA pipeline as a `Model`; its LoRA targets are the projections of self and cross attention."""

    lora_targets = ATTENTION
    patch = 1
    longest_text = 300

    def prepare(self) -> None:
        """A reader of the negative caption."""
        self.instruction = inspect.signature(type(self.pipeline).__call__).parameters["complex_human_instruction"].default
        self._negative = captions_of(self.pipeline, self.read_plain, self.device, self.offload, "negative", *self._said())

    def read(self, text: str) -> dict[str, Tensor]:
        """The caption after the instruction, with its mask."""
        return self._embed(text, self.instruction)

    def read_plain(self, text: str) -> dict[str, Tensor]:
        """The caption alone."""
        return self._embed(text, None)

    def _embed(self, text: str, instruction: Any) -> dict[str, Tensor]:
        embeds, mask, *_ = self.pipeline.encode_prompt(
            text,
            do_classifier_free_guidance=False,
            device=self.device,
            max_sequence_length=self.text_length,
            complex_human_instruction=instruction,
        )
        return {"encoder_hidden_states": embeds[0], "encoder_attention_mask": mask[0]}

    def blank(self, tokens: int) -> dict[str, Tensor]:
        """See `Family.blank`."""
        words = self.empty(tokens, self.network.config.caption_channels)
        return {"encoder_hidden_states": words, "encoder_attention_mask": self.empty(tokens).long()}

    def encode_negative(self) -> Conditioning:
        """Without the instruction."""
        return self._negative([self.negative])

    def time(self, t: Tensor) -> Tensor:
        """1000 t times the network's own scale."""
        return 1000 * t * self.network.config.timestep_scale

    def unpack(self, v: Tensor) -> Tensor:
        """Without the variance that some networks also give."""
        return v[:, : self.latent_shape[0]]

    def own_resolution(self) -> int:
        """The network's sample size in pixels."""
        return self.network.config.sample_size * self.scale

    def call_options(self, guidance: float) -> Mapping[str, object]:
        """See `Model.call_options`."""
        return {**super().call_options(guidance), "use_resolution_binning": False}
