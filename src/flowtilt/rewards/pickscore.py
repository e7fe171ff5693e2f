"""PickScore, arXiv 2305.01569: a CLIP ViT-H/14 fine-tuned on the choices of Pick-a-Pic's users."""

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from flowtilt.errors import UserError
from flowtilt.prompts import Prompt
from flowtilt.rewards import RewardOutput, clip, pixels
from flowtilt.rewards.about import find_weights

UNIT = 26
"""DiffusionNFT and flow_grpo divide by it, to bring scores near 1."""


class PickScore:
    """exp(logit_scale) * cosine / 26, about 0.65 to 0.92; the detail "raw" is the score that papers print, times 26.

    Of an image that is not square only the middle is seen. Prompts over 77 tokens are cut.

    Args:
        device: where the model is.

    Raises:
        UserError: weights are missing or not the right ones.
    """

    def __init__(self, *, device: torch.device | str):
        self.clip = clip.load("pickscore", device)
        if not 50 <= self.clip.logit_scale <= 120:
            scale = f"{self.clip.logit_scale:.4g}"
            path = find_weights("pickscore")
            raise UserError(f"{path}: exp(logit_scale) is {scale}, PickScore's is about 100; these are another model's weights")

    @property
    def modules(self) -> tuple[nn.Module, ...]:
        """What may leave the device between two calls."""
        return (self.clip.model,)

    @torch.no_grad()
    def __call__(self, images: Tensor, prompts: Sequence[Prompt]) -> RewardOutput:
        """Scores [N] of images [N, 3, H, W] in [0, 1], each with its prompt."""
        scores = self._score(pixels.bicubic_crop(images), prompts)
        return RewardOutput(scores, details={"raw": UNIT * scores})

    def differentiable(self, images: Tensor, prompts: Sequence[Prompt], *, resize: Literal["bicubic", "bilinear"] = "bicubic") -> Tensor:
        """The same scores [N] but for the rounding to 8 bits, with a gradient to the images.

        Args:
            resize: RTDMD's code back-propagates through a bilinear one, which is visibly another input.
        """
        crop = pixels.bicubic_crop_tensor if resize == "bicubic" else pixels.bilinear_crop
        return self._score(crop(images), prompts)

    def _score(self, crops: Tensor, prompts: Sequence[Prompt]) -> Tensor:
        texts = self.clip.text_features([prompt.text for prompt in prompts])
        cosine = (self.clip.image_features(crops) * texts).sum(1)
        return self.clip.logit_scale / UNIT * cosine
