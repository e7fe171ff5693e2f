"""What the methods on the forward process share: clean samples, each trained at several noise levels."""

from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import BeforeValidator, Field

from flowtilt.methods.base import LEVELS, MOST_LAG, WEIGHT, Passes, as_tuple, sampled
from flowtilt.methods.guide import GuideSettings

if TYPE_CHECKING:
    from flowtilt.config import Recipe


LEAST_TO_MOST = 0.02, 1.0
"""Of stratified times: at 0 nothing is left to learn."""


def old_policy_decay(schedule: str, optimizer_step: int) -> float:
    """d in old <- d old + (1 - d) current, after a rollout's optimizer steps; s counts them from the run's start.

    "copy": 0. "linear": min(0.001 s, 0.5). "short": min(0.001 s, 0.3). "delayed": 0 before s = 75, then
    min(0.0075 (s - 75), 0.999).

    Raises:
        ValueError: an unknown schedule.
    """
    match schedule:
        case "copy":
            return 0.0
        case "linear":
            return min(0.001 * optimizer_step, 0.5)
        case "short":
            return min(0.001 * optimizer_step, 0.3)
        case "delayed":
            return 0.0 if optimizer_step < 75 else min(0.0075 * (optimizer_step - 75), 0.999)
    raise ValueError(f"schedule {schedule!r} is not one of copy, linear, short, delayed")


class ForwardSettings(GuideSettings):
    """A method that declares a key `kl` is pulled to the reference by kl mean (v - v_ref)^2."""

    type: Any = ""
    """The method's own word; named here so that it comes first."""
    norm_guard: float = Field(default=0.0, ge=0, le=WEIGHT)
    """Weight of NormGuard's hinge (arXiv 2606.27771): the mean square by which |v| exceeds |v_ref|."""
    old_policy: Literal["copy", "linear", "short", "delayed"] = "linear"
    """Decay of the collecting policy at optimizer step s: 0; min(.001 s, .5); min(.001 s, .3); 0, from 75 on min(.0075 (s - 75), .999)."""
    times: Literal["rollout", "stratified"] = "rollout"
    """Training times of an image: the rollout's own noise levels in random order, or uniform in equal strata and shifted alike."""
    times_per_image: int = Field(default=9, ge=1, le=LEVELS)
    """Noise levels at which each image is trained per rollout."""
    times_range: Annotated[tuple[float, float], BeforeValidator(as_tuple)] = LEAST_TO_MOST
    """Part of (0, 1] that stratified times fill, before the shift."""
    shared: Literal["none", "noise", "time", "both"] = "none"
    """What the images of a prompt have in common in training: nothing, the noise, the noise levels, or both (V-GRPO, arXiv 2604.23380)."""
    reference_share: float = Field(default=1.0, gt=0, le=1)
    """Share of the rows on which the reference is evaluated, with the inverse as their weight; 0.25 saves three quarters of its passes."""
    row_share: float = Field(default=1.0, gt=0, le=1)
    """Share of the pairs of image and time that are trained, sampled in proportion to |A| + 0.3 rms(A) and weighted by the inverse."""

    reads_reference: ClassVar[bool] = False
    """Whether the method's own loss reads the reference's velocity, of every row."""
    most_lag: ClassVar[int] = MOST_LAG
    """The losses compare with v_old, the policy that sampled the image."""

    @property
    def reference(self) -> bool:
        """Whether the reference is evaluated, one forward pass per pair of image and time."""
        return self.pull > 0 or self.norm_guard > 0

    def check(self, recipe: "Recipe") -> None:
        super().check(recipe)
        steps = recipe.rollout.steps
        if self.times == "rollout" and self.times_per_image > steps:
            default = "" if "times_per_image" in self.model_fields_set else ", which is the default"
            raise ValueError(
                f"objective.times_per_image: a rollout of {steps} steps has no {self.times_per_image} noise levels{default}; "
                'lower it or set times = "stratified"'
            )
        if self.reference_share < 1 and self.reads_reference:
            raise ValueError(f"objective.reference_share: {self.type} compares every row with the reference; set it to 1")
        low, high = self.times_range
        if not 0 <= low < high <= 1:
            raise ValueError(f"objective.times_range: {low:g} to {high:g} must increase within 0 to 1")
        for key, plain in (("times_range", LEAST_TO_MOST), ("row_share", 1.0)):
            if self.times == "rollout" and getattr(self, key) != plain:
                raise ValueError(f'objective.{key}: needs times = "stratified"')
        if self.row_share < 1 and self.shared != "none":
            raise ValueError("objective.row_share: images of a prompt that share noise or times have as many rows each; set it to 1")

    def levels_from(self, level: float) -> float:
        low, high = self.times_range if self.times == "stratified" else (0.0, 1.0)
        return (high - min(max(level, low), high)) / (high - low)

    def rows_per_image(self, steps: int) -> int:
        return self.times_per_image

    def first_share(self, images: int, updates: int, group: int) -> int:
        """Images of the first of so many updates; `group` are those of a prompt that are trained."""
        return images // updates

    def passes(self, recipe: "Recipe", step: int) -> Passes:
        images, updates = recipe.rollout.trained(), recipe.optimizer.steps_per_rollout
        pairs = round(images * self.times_per_image * self.row_share)
        # the rollout before left the old policy equal to the current one, which the first update moves
        lagging = recipe.rollout.lag > 0
        equal = step == 1 or (not lagging and old_policy_decay(self.old_policy, (step - 1) * updates) == 0)
        first = round(self.first_share(images, updates, images // recipe.rollout.prompts) * self.times_per_image * self.row_share)
        old = pairs - (first if equal else 0)
        return Passes(sample=sampled(recipe), pairs=pairs, old=old, reference=self.reference_passes(pairs, step))


class AdvantageSettings(ForwardSettings):
    """What the methods share that weigh an image's error by its advantage."""

    kl: float = Field(default=1e-4, ge=0, le=WEIGHT)
    """Weight of mean (v - v_ref)^2; 0 saves the reference's forward pass."""
    consistency: float = Field(default=0.0, ge=0, le=WEIGHT)
    """Added to every advantage, in its unit: flow matching on the policy's own images, which keeps it from drifting."""

    affine: ClassVar[bool] = True
