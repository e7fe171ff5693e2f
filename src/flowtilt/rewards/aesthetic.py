"""LAION's improved aesthetic predictor: a linear head on CLIP's features of an image (christophschuhmann/improved-aesthetic-predictor)."""

from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

import torch
from torch import Tensor, nn

from flowtilt.errors import UserError
from flowtilt.io import weights
from flowtilt.prompts import Prompt
from flowtilt.rewards import clip, pixels
from flowtilt.rewards.about import find_weights

LAYERS = {0: 1024, 2: 128, 4: 64, 6: 16, 7: 1}
"""The head's linear layers by their place, and their widths; dropouts stand between them, activations nowhere."""


class Aesthetic:
    """How people like an image, 1 to 10; most lie in 4.5 to 6.5. The prompt is not read.

    Args:
        device: where the model is.

    Raises:
        UserError: weights are missing or not the right ones.
    """

    def __init__(self, *, device: torch.device | str):
        self.clip = clip.load("clip-l", device)
        path = find_weights("aesthetic")
        self.vector, self.bias = fold(weights.read(path), self.clip.model.visual_projection.out_features, path)

    @property
    def modules(self) -> tuple[nn.Module, ...]:
        """What may leave the device between two calls."""
        return (self.clip.model,)

    @torch.no_grad()
    def __call__(self, images: Tensor, prompts: Sequence[Prompt]) -> Tensor:
        """Scores [N] of images [N, 3, H, W] in [0, 1]."""
        features = self.clip.image_features(pixels.bicubic_crop(images))
        return features.mul(self.vector.to(features.device)).sum(1) + self.bias


def fold(state: dict[str, Tensor], width: int, path: Path) -> tuple[Tensor, float]:
    """The head's five linear layers as one: a vector [width] in fp32 and a bias.

    Args:
        state: "layers.{0,2,4,6,7}.{weight,bias}".
        width: of the features.
        path: where it comes from, for messages.

    Raises:
        UserError: other names or shapes.
    """
    want: dict[str, tuple[int, ...]] = {}
    for (_, inner), (place, outer) in pairwise([(-1, width), *LAYERS.items()]):
        want |= {f"layers.{place}.weight": (outer, inner), f"layers.{place}.bias": (outer,)}
    for key in sorted(want.keys() | state.keys()):
        found = tuple(state[key].shape) if key in state else "missing"
        if found != want.get(key, "not there"):
            raise UserError(f"{path}: {key} is {found}, should be {want.get(key, 'not there')}; not the aesthetic head for this CLIP")
    matrix, bias = torch.eye(width, dtype=torch.float64), torch.zeros(width, dtype=torch.float64)
    for place in LAYERS:
        weight = state[f"layers.{place}.weight"].double()
        matrix, bias = weight @ matrix, weight @ bias + state[f"layers.{place}.bias"].double()
    return matrix[0].float(), float(bias)
