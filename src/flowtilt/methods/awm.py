"""Advantage weighted matching, arXiv 2509.25050. The loss: objectives/awm.py."""

from typing import ClassVar, Literal

from pydantic import Field

from flowtilt.methods.base import LEVELS, NO_CLIP, WEIGHT, Contrast
from flowtilt.methods.forward import AdvantageSettings


class AWMSettings(AdvantageSettings):
    type: Literal["awm"] = "awm"
    """The method; "awm" is advantage weighted matching, arXiv 2509.25050."""
    clip_range: float = Field(default=1.0, gt=0, le=NO_CLIP)
    """The likelihood ratio counts up to 1 plus and minus this."""
    advantage_clip: float = Field(default=5.0, gt=0, le=NO_CLIP)
    """Advantages beyond this many standard deviations count as this many; what is left is divided by it."""
    weighting: Literal["ghuber", "uniform"] = "ghuber"
    """What stands for log p: a generalised Huber of the matching error, times t, or the error itself."""
    anchor: float = Field(default=1.0, ge=0, le=WEIGHT)
    """Weight of mean (v - v_old)^2, the pull to the collecting policy."""
    kl: float = Field(default=1e-3, ge=0, le=WEIGHT)
    """Weight of mean (v - v_ref)^2: .001 for GenEval, .003 for OCR, 1e-4 for PickScore; 0 saves the reference's forward pass."""
    old_policy: Literal["copy", "linear", "short", "delayed"] = "short"
    """As for "nft"; "short" is the published pace of the anchor."""
    times_per_image: int = Field(default=6, ge=1, le=LEVELS)
    """Noise levels at which each image is trained per rollout."""

    objective: ClassVar[str] = "flowtilt.objectives.awm:AWM"

    @property
    def contrast(self) -> Contrast:
        return Contrast("anchor", "objective.clip_range and objective.anchor do nothing")
