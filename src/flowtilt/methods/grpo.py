"""FlowGRPO, arXiv 2505.05470, with Fast, MixGRPO and GRPO-Guard. The loss: objectives/grpo.py."""

from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field

from flowtilt.methods.base import NO_CLIP, WEIGHT
from flowtilt.methods.steps import StepSettings

if TYPE_CHECKING:
    from flowtilt.config import Recipe


class GRPOSettings(StepSettings):
    type: Literal["grpo"] = "grpo"
    """The method; "grpo" is FlowGRPO, arXiv 2505.05470: a policy gradient over stochastic steps of the rollout."""
    clip_range: float = Field(default=1e-4, gt=0, le=NO_CLIP)
    """The likelihood ratio counts up to 1 plus and minus this; small, since log p is a mean over a latent's values."""
    kl: float = Field(default=0.04, ge=0, le=WEIGHT)
    """Weight of the distance of a step's mean from the reference's: .04 for GenEval and OCR, .01 for PickScore; 0 saves that pass."""
    advantage_clip: float = Field(default=5.0, gt=0, le=NO_CLIP)
    """Advantages beyond this many standard deviations count as this many."""
    guard: bool = False
    """GRPO-Guard (arXiv 2510.22319): one distribution of ratios and one weight for all steps; wants a clip_range of its own."""

    trust: float | None = Field(default=None, gt=0, le=NO_CLIP)
    """Flow-DPPO (arXiv 2606.11025): no clip of the ratio; a step whose mean has moved from the old one's by this KL stops counting."""
    guide_of: Literal["old", "reference"] = "reference"
    """Whose velocity is guided: the base's. With the collecting policy's it adds up and the run collapses: nothing here pulls back."""
    guide_scale: float = Field(default=3.0, gt=1, le=WEIGHT)
    """Guidance scale s of the guide's target: v_ref guided by s, or v_old + (s - 1)(v_old - v_ref of no words)."""

    def check(self, recipe: "Recipe") -> None:
        super().check(recipe)
        if self.trust is not None and self.guard:
            raise ValueError("objective.trust: Flow-DPPO has no ratio to guard; set guard = false, or leave trust out")

    objective: ClassVar[str] = "flowtilt.objectives.grpo:GRPO"
    affine: ClassVar[bool] = True
