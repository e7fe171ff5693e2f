"""Lumina-Image 2.0 (arXiv 2503.21758): one sequence of caption and image, which reads Gemma 2.

The network counts time from noise to data and predicts data minus noise. A system prompt stands before every caption but the negative
one. Guidance is rescaled to the norm of the conditional prediction, row of latents by row, as the pipeline does it.
"""

import torch
from torch import Tensor

from flowtilt.models.captions import captions_of
from flowtilt.models.conditioning import Conditioning
from flowtilt.models.family import ATTENTION, Family
from flowtilt.models.guidance import rescaled
from flowtilt.models.levels import mu_by_tokens


class Lumina2(Family):
    """A Lumina-Image 2 pipeline as a `Model`; its LoRA targets are the projections of every attention, the refiners' among them."""

    lora_targets = ATTENTION
    block_lists = ("noise_refiner", "context_refiner", "layers")
    longest_text = 256
    negated = True
    row_by_row = True

    def prepare(self) -> None:
        """A reader of the negative caption."""
        self._negative = captions_of(self.pipeline, self.read_plain, self.device, self.offload, "negative", *self._said())

    def read(self, text: str) -> dict[str, Tensor]:
        """The caption after the system prompt, with its mask."""
        embeds, mask, *_ = self.pipeline.encode_prompt(
            text, do_classifier_free_guidance=False, device=self.device, max_sequence_length=self.text_length
        )
        return {"encoder_hidden_states": embeds[0], "encoder_attention_mask": mask[0].bool()}

    def blank(self, tokens: int) -> dict[str, Tensor]:
        """See `Family.blank`."""
        words = self.empty(tokens, self.network.config.cap_feat_dim)
        # the network counts the words of each caption, so this one has values
        return {"encoder_hidden_states": words, "encoder_attention_mask": torch.ones(tokens, dtype=torch.bool)}

    def read_plain(self, text: str) -> dict[str, Tensor]:
        """The caption alone, as the pipeline reads a negative one."""
        _, _, embeds, mask = self.pipeline.encode_prompt(
            "", negative_prompt=[text], device=self.device, max_sequence_length=self.text_length
        )
        return {"encoder_hidden_states": embeds[0], "encoder_attention_mask": mask[0].bool()}

    def encode_negative(self) -> Conditioning:
        """Without the system prompt."""
        return self._negative([self.negative])

    def time(self, t: Tensor) -> Tensor:
        """1 - t: the network counts from noise to data."""
        return 1 - t

    def mu(self, steps: int) -> float:
        """The pipeline takes the number of channels for that of tokens; the published scheduler has a static shift and reads none."""
        return mu_by_tokens(self.pipeline.scheduler.config, self.latent_shape[0])

    def guide(self, v: Tensor, free: Tensor, guidance: float) -> Tensor:
        """Linear, then rescaled to the norm of v."""
        return rescaled(v, free, guidance)

    def largest_resolution(self) -> int:
        """That of the rows and columns that the network has positions for."""
        return self.scale * self.patch * min(self.network.config.axes_lens[1:])
