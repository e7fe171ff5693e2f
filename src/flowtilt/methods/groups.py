"""What the methods share whose loss compares the images of a prompt at the same noise level: CRD and DGPO."""

from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field

from flowtilt.methods.base import NO_CLIP, WEIGHT, Contrast, Passes
from flowtilt.methods.forward import ForwardSettings

if TYPE_CHECKING:
    from flowtilt.config import Recipe


class GroupSettings(ForwardSettings):
    type: Any = ""
    """The method's own word; named here so that it comes first."""
    shared: Literal["none", "noise", "time", "both"] = "both"
    """What the images of a prompt have in common in training; with "both" their errors can be compared."""
    advantage_clip: float = Field(default=5.0, gt=0, le=NO_CLIP)
    """Advantages beyond this many standard deviations count as this many."""

    @property
    def frozen(self) -> bool:
        """Whether the errors of the base are compared with, too."""
        return False

    def check(self, recipe: "Recipe") -> None:
        super().check(recipe)
        if self.shared not in ("time", "both"):
            raise ValueError(f'objective.shared: {self.type} compares images at the same noise level; set it to "both" or "time"')
        if recipe.optimizer.steps_per_rollout > recipe.rollout.prompts:
            raise ValueError(f"optimizer.steps_per_rollout: {self.type} trains whole prompts, and a rollout has {recipe.rollout.prompts}")

    def first_share(self, images: int, updates: int, group: int) -> int:
        return images // group // updates * group

    def passes(self, recipe: "Recipe", step: int) -> Passes:
        """One more forward pass of every row than other methods: a first pass measures the groups, a second learns from them."""
        once = super().passes(recipe, step)
        reference = self.reference_passes(once.pairs, step) + (once.pairs if self.frozen else 0)
        old = once.old + once.pairs + self.guide_old(once.pairs, step, once.old / once.pairs)
        return Passes(sample=once.sample, pairs=once.pairs, old=old, reference=reference)


class CRDSettings(GroupSettings):
    type: Literal["crd"] = "crd"
    """The method; "crd" is centred reward distillation, arXiv 2603.14128."""
    beta: float = Field(default=1.0, gt=0, le=WEIGHT)
    """Scale of the implicit reward against the advantage."""
    form: Literal["mse", "bce"] = "mse"
    """The regression: a square, or a cross-entropy whose gradient at the start is an eighth of it."""
    centring: float | None = Field(default=None, gt=0, le=WEIGHT)
    """Temperature of the softmax over advantages that weighs the group's mean, with both signs; none takes the plain mean."""
    kl: float = Field(default=0.1, ge=0, le=WEIGHT)
    """Weight of mean (v - v_ref)^2 at the best advantage; a thousandth of it at the worst. 0 saves the reference's pass."""
    reference_guidance: float = Field(default=4.5, ge=1, le=WEIGHT)
    """Guidance scale of that reference; 1 turns it off and saves a pass."""

    objective: ClassVar[str] = "flowtilt.objectives.groups:CRD"

    @property
    def contrast(self) -> Contrast:
        return Contrast("implicit_reward", "objective.beta does nothing and this is plain advantage-weighted matching")


class DGPOSettings(GroupSettings):
    type: Literal["dgpo"] = "dgpo"
    """The method; "dgpo" is direct group preference optimisation, arXiv 2510.08425."""
    beta: float = Field(default=100.0, gt=0, le=WEIGHT)
    """Scale of the group's preference; it belongs to mean squares: 100 for GenEval and OCR, 10 for PickScore."""
    clip_range: float = Field(default=0.01, gt=0, le=NO_CLIP)
    """An image stops counting where its likelihood ratio has moved by more than this in the direction of its advantage."""
    compare: Literal["base", "old"] = "base"
    """Whose errors the trained policy's are compared with: the frozen base's, or the collecting policy's, which saves a pass."""
    kl: float = Field(default=0.02, ge=0, le=WEIGHT)
    """Weight of mean (v - v_ref)^2: .02 for GenEval and OCR, .001 for PickScore; 0 saves the reference's pass."""

    objective: ClassVar[str] = "flowtilt.objectives.groups:DGPO"

    @property
    def frozen(self) -> bool:
        """Whether the errors of the base are compared with, too."""
        return self.compare == "base"
