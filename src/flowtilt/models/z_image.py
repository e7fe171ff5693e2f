"""Z-Image and Z-Image-Turbo (arXiv 2511.22699): a 6B transformer on one sequence of image and caption, which reads Qwen3.

The network takes lists of images and of captions, time as 1 - sigma, and predicts data minus noise. The pipeline's guidance w means
v + w (v - v_negative), the linear rule at w + 1. Turbo is distilled and is sampled without guidance.
"""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from flowtilt.models.conditioning import Conditioning
from flowtilt.models.family import ATTENTION, Family


class ZImage(Family):
    """A Z-Image pipeline as a `Model`; its LoRA targets are the projections of every attention, the refiners' among them."""

    lora_targets = ATTENTION
    block_lists = ("noise_refiner", "context_refiner", "layers")
    ragged = True
    row_by_row = True
    negated = True

    def read(self, text: str) -> dict[str, Tensor]:
        """The last hidden states but one of the caption in its chat template."""
        (embeds,), _ = self.pipeline.encode_prompt(
            [text], self.device, do_classifier_free_guidance=False, max_sequence_length=self.text_length
        )
        return {"caption": embeds}

    def blank(self, tokens: int) -> dict[str, Tensor]:
        """See `Family.blank`."""
        return {"caption": self.empty(tokens, self.network.config.cap_feat_dim)}

    def time(self, t: Tensor) -> Tensor:
        """1 - t: the network counts from noise to data."""
        return 1 - t

    def inputs(self, x: Tensor, t: Tensor, conditioning: Conditioning) -> dict[str, Any]:
        """Lists of images, each a video of one frame, and of captions, each with its own tokens alone."""
        captions = conditioning.tensors()["caption"].to(self.dtype)
        own = [caption[:tokens] for caption, tokens in zip(captions, conditioning.tokens(), strict=True)]
        return {"x": list(x[:, :, None].unbind(0)), "t": t, "cap_feats": own}

    def unpack(self, v: Tensor) -> Tensor:
        """Without the axis of frames."""
        return v.squeeze(2)

    def largest_resolution(self) -> int:
        """That of the rows and columns that the network has positions for."""
        return self.scale * self.patch * min(self.network.config.axes_lens[1:])

    def call_options(self, guidance: float) -> Mapping[str, object]:
        """See `Model.call_options`: the pipeline's `guidance_scale` is one less."""
        return {**super().call_options(guidance), "guidance_scale": guidance - 1}
