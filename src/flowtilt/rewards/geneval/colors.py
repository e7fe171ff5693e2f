"""An object's colour, as GenEval asks CLIP for it: the object on grey, against ten colours' descriptions."""

from collections.abc import Sequence

import torch
from torch import Tensor

from flowtilt.io.images import to_bytes
from flowtilt.prompts.geneval_objects import COLORS
from flowtilt.rewards import clip
from flowtilt.rewards.pixels import bicubic_crop

TEMPLATES = ("a photo of a {color} {name}", "a photo of a {color}-colored {name}", "a photo of a {color} object")
GREY = 153
"""Level of the background that replaces what is not the object."""
SIDE = 224


def crop(image: Tensor, mask: Tensor, box: Sequence[float]) -> Tensor | None:
    """The object alone on grey, [3, 224, 224] in [0, 1]; None where the box holds no pixel.

    Args:
        image: [3, H, W] in [0, 1].
        mask: bool [H, W].
        box: x1, y1, x2, y2 in pixels, rounded half to even.
    """
    x1, y1, x2, y2 = (max(round(float(side)), 0) for side in box)
    part, inside = to_bytes(image[None])[:, :, y1:y2, x1:x2], mask[y1:y2, x1:x2]
    if not part.numel():
        return None
    alone = torch.where(inside.to(part.device), part, GREY).float() / 255
    return bicubic_crop(alone, SIDE, rounding="half_even")[0]


class ColorClassifier:
    """CLIP ViT-L/14 over the ten colours, fp32; the published benchmark runs it under half-precision autocast.

    Raises:
        UserError: CLIP's weights are missing.
    """

    def __init__(self, device: torch.device | str):
        self.clip = clip.load("clip-l", device)
        self._of_class: dict[str, Tensor] = {}

    @torch.no_grad()
    def __call__(self, crops: Tensor, names: Sequence[str]) -> list[str]:
        """The colour of each object.

        Args:
            crops: [N, 3, 224, 224] in [0, 1].
            names: the objects' classes, one a crop.
        """
        images = self.clip.image_features(crops)
        colors = torch.stack([self._describe(name).to(images.device) for name in names])
        return [COLORS[k] for k in torch.einsum("nd,ncd->nc", images, colors).argmax(1).tolist()]

    def _describe(self, name: str) -> Tensor:
        """A unit vector for each colour of a class, [10, D]: the mean direction of its descriptions."""
        if name not in self._of_class:
            texts = [template.format(color=color, name=name) for color in COLORS for template in TEMPLATES]
            features = self.clip.text_features(texts, clean=True).unflatten(0, (len(COLORS), len(TEMPLATES)))
            self._of_class[name] = torch.nn.functional.normalize(features.mean(1), dim=1)
        return self._of_class[name]
