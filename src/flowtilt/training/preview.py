"""The first images of a rollout, for whoever watches a run."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from PIL import Image as Picture
from torch import Tensor

from flowtilt.io.images import sheet
from flowtilt.io.showing import Showable

IMAGES = 8
"""Of a rollout, at most."""


@dataclass(frozen=True)
class Preview(Showable):
    """A few images of a rollout, in order of prompts.

    Args:
        rollout: its number, from 1.
        images: [M, 3, H, W] fp32 in [0, 1], on the CPU.
        prompts: the captions, M.
        scores: [M] by reward.
        sources: the source images of edits, as `images`.
    """

    rollout: int
    images: Tensor = field(repr=False)
    prompts: Sequence[str]
    scores: Mapping[str, Tensor] = field(default_factory=dict, repr=False)
    sources: Tensor | None = field(default=None, repr=False)

    def __len__(self) -> int:
        return len(self.images)

    def picture(self) -> Picture.Image:
        if self.sources is None:
            return sheet(self.images.split(1))
        return sheet([self.sources, self.images])
