"""ClipScore: the cosine between CLIP's features of an image and of its prompt (arXiv 2104.08718, without its factor)."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from flowtilt.prompts import Prompt
from flowtilt.rewards import clip, pixels


class ClipScore:
    """exp(logit_scale) / 100 * cosine, about 0.15 (unrelated) to 0.35; with OpenAI's ViT-L/14 the factor is 1.

    Images are resized bilinearly and unrounded, as in DiffusionNFT's code, though CLIP was trained with
    bicubic ones: the papers' figures are made so. Prompts over 77 tokens are cut.

    Args:
        device: where the model is.

    Raises:
        UserError: weights are missing or not the right ones.
    """

    def __init__(self, *, device: torch.device | str):
        self.clip = clip.load("clip-l", device)

    @property
    def modules(self) -> tuple[nn.Module, ...]:
        """What may leave the device between two calls."""
        return (self.clip.model,)

    @torch.no_grad()
    def __call__(self, images: Tensor, prompts: Sequence[Prompt]) -> Tensor:
        """Scores [N] of images [N, 3, H, W] in [0, 1], each with its prompt."""
        return self.differentiable(images, prompts)

    def differentiable(self, images: Tensor, prompts: Sequence[Prompt]) -> Tensor:
        """The same scores, with a gradient to the images."""
        texts = self.clip.text_features([prompt.text for prompt in prompts])
        cosine = (self.clip.image_features(pixels.bilinear_crop(images)) * texts).sum(1)
        return self.clip.logit_scale / 100 * cosine
