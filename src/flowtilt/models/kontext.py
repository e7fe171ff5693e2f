"""FLUX.1-Kontext: FLUX.1-dev that edits. The source image's tokens stand at the same rows and columns as the result's, at index 1."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from flowtilt.models.conditioning import Conditioning
from flowtilt.models.editing import Editing
from flowtilt.models.flux import Flux


class Kontext(Editing, Flux):
    """A FLUX.1-Kontext pipeline as a `Model`; arguments as of `Flux`.

    Args:
        source_resolution: height and width of source images in pixels; none takes 1024, the pipeline's own for a square.
    """

    def __init__(
        self,
        pipeline: Any,
        *,
        t5_length: int | None = None,
        resolution: int | None = None,
        offload: bool = False,
        embedded_guidance: float | None = None,
        source_resolution: int | None = None,
    ):
        self.take_sources(pipeline, source_resolution)
        super().__init__(pipeline, t5_length=t5_length, resolution=resolution, offload=offload, embedded_guidance=embedded_guidance)
        self.protocol = {**self.protocol, "source_resolution": self.source_resolution}
        side = self.source_resolution // self.scale // self.patch
        axes = (torch.arange(float(n), device=self.device) for n in (1, side, side))
        self._source_positions = torch.cartesian_prod(*axes) + torch.tensor([1.0, 0, 0], device=self.device)

    def inputs(self, x: Tensor, t: Tensor, conditioning: Conditioning) -> dict[str, Any]:
        """As FLUX.1's, with the source's tokens and where they stand."""
        given = super().inputs(self.with_source(x, conditioning), t, conditioning)
        return {**given, "img_ids": torch.cat([self._positions, self._source_positions])}

    def call_options(self, guidance: float) -> Mapping[str, object]:
        """See `Model.call_options`: the source's size stays as it is given."""
        return {**super().call_options(guidance), "max_area": self.resolution**2, "_auto_resize": False}
