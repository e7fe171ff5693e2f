"""Human Preference Score v2.1, arXiv 2306.09341."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from flowtilt.prompts import Prompt
from flowtilt.rewards import clip, pixels


class HPSv2:
    """The cosine of a CLIP ViT-H/14 fine-tuned on people's choices, about 0.15 to 0.38; tables show 100 times this.

    The whole image is read, black bars around it. Prompts over 77 tokens are cut. The published package
    computes in half precision, which moves the third digit.

    Args:
        device: where the model is.

    Raises:
        UserError: weights are missing or not the right ones.
    """

    def __init__(self, *, device: torch.device | str):
        self.clip = clip.load("hpsv2", device)

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
        texts = self.clip.text_features([prompt.text for prompt in prompts], clean=True)
        return (self.clip.image_features(pixels.fit_longest(images)) * texts).sum(1)
