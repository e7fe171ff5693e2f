"""Chroma: FLUX.1-schnell with guidance taken out of the network, 8.9B; a T5 reads, and its mask with one pad token goes to the network."""

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from flowtilt.models.conditioning import Conditioning
from flowtilt.models.family import JOINT, Packed


class Chroma(Packed):
    """A Chroma pipeline as a `Model`; its LoRA targets are the attention's projections, those of the single blocks among them."""

    lora_targets = tuple(f"attn.{name}" for name in JOINT)
    block_lists = ("transformer_blocks", "single_transformer_blocks")

    def prepare(self) -> None:
        """Where each patch stands."""
        axes = (torch.arange(float(n), device=self.device) for n in (1, self.side // 2, self.side // 2))
        self._positions = torch.cartesian_prod(*axes)

    def read(self, text: str) -> dict[str, Tensor]:
        """As the pipeline's own `encode_prompt` makes it, with its mask."""
        found = self.pipeline.encode_prompt(
            text, do_classifier_free_guidance=False, device=self.device, max_sequence_length=self.text_length
        )
        return {"encoder_hidden_states": found[0][0], "attention_mask": found[2][0]}

    def inputs(self, x: Tensor, t: Tensor, conditioning: Conditioning) -> dict[str, Any]:
        """Tokens, captions, their mask and the image's, and where everything stands."""
        given = super().inputs(x, t, conditioning)
        mask = pad(given.pop("attention_mask"), (0, x.shape[1]), value=1.0)
        text = self._positions.new_zeros(given["encoder_hidden_states"].shape[1], 3)
        return {**given, "attention_mask": mask, "img_ids": self._positions, "txt_ids": text}
