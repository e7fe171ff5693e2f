"""Chroma: FLUX.1-schnell with guidance taken out of the network, 8.9B; a T5 reads, and its mask with one pad token goes to the network."""

from collections.abc import Mapping
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

    def blank(self, tokens: int) -> dict[str, Tensor]:
        """See `Family.blank`."""
        words = self.empty(tokens, self.network.config.joint_attention_dim)
        return {"encoder_hidden_states": words, "attention_mask": self.empty(tokens)}

    def _mask(self, conditioning: Conditioning) -> Tensor:
        """The caption's mask, then ones for the image, [N, L]: numbers, which the network adds to its attention scores."""
        return pad(conditioning.tensors()["attention_mask"].to(self.dtype), (0, len(self._positions)), value=1.0)

    def inputs(self, x: Tensor, t: Tensor, conditioning: Conditioning) -> dict[str, Any]:
        """Tokens, captions, their mask and the image's, and where everything stands."""
        given = super().inputs(x, t, conditioning)
        text = self._positions.new_zeros(given["encoder_hidden_states"].shape[1], 3)
        return {**given, "attention_mask": self._mask(conditioning), "img_ids": self._positions, "txt_ids": text}

    def velocity(self, x: Tensor, t: Tensor, conditioning: Conditioning, weights: Mapping[str, Tensor] | None = None) -> Tensor:
        """As `Family.velocity`. With gradient checkpointing, diffusers 0.42 leaves the mask out of single blocks; it is given to them."""
        if not self.network.gradient_checkpointing:
            return super().velocity(x, t, conditioning, weights)
        recompute, mask = self.network._gradient_checkpointing_func, self._mask(conditioning)
        single = {id(block) for block in self.network.single_transformer_blocks}

        def with_mask(block: Any, *args: Any) -> Any:
            return recompute(block, *args, mask) if id(block) in single else recompute(block, *args)

        self.network._gradient_checkpointing_func = with_mask
        try:
            return super().velocity(x, t, conditioning, weights)
        finally:
            self.network._gradient_checkpointing_func = recompute
