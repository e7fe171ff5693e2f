"""RTDMD, arXiv 2605.26108: "acdmd" distils a student of few steps, "rtdmd" reinforces it. The losses: objectives/rtdmd.py."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field, field_validator

from flowtilt.io.user_code import absolute
from flowtilt.methods.base import LEVELS, NO_CLIP, WEIGHT, Method, Passes, Weight, check_followed, trained_rewards

if TYPE_CHECKING:
    from flowtilt.config import Recipe


class MatchingSettings(Method):
    """What the two stages share: a student of few steps meets its teacher in distribution."""

    type: Any = ""
    """The method's own word; named here so that it comes first."""
    teacher_guidance: float = Field(default=4.5, ge=1, le=WEIGHT)
    """Classifier-free guidance of the teacher, the bare base; the student never has any."""
    fake_lr: float = Field(default=3e-5, gt=0, le=WEIGHT)
    """Constant learning rate of the fake score, which learns what the student samples; `[optimizer]` has the student's."""
    consistency: float = Field(default=0.01, ge=0, le=WEIGHT)
    """Weight of the fake score's consistency along steps of cps; 0 saves two of its three forward and backward passes."""
    consistency_span: float = Field(default=0.2, gt=0, le=1)
    """Such a step goes down by up to this much in t."""
    normaliser: Literal["noisy", "mean"] = "noisy"
    """What divides a sample's gradient: its distance from the teacher's projection as sampled, with noise in it, or without."""

    trains_all_weights: ClassVar[bool] = False

    def check_few_steps(self, recipe: "Recipe") -> None:
        """As `check`, for what both stages want of a rollout."""
        r = recipe.rollout
        if r.solver != "cps":
            raise ValueError(f'rollout.solver: {self.type} trains the steps of "cps", not those of "{r.solver}"')
        if r.guidance != 1:
            raise ValueError(f"rollout.guidance: a student of {self.type} samples without guidance; set it to 1 and see teacher_guidance")
        if recipe.shard == "base":
            raise ValueError(f'shard: {self.type} does not go with "base" yet; set it to "none"')

    @property
    def other_roles(self) -> int:
        """The fake score."""
        return 1

    @property
    def graph_passes(self) -> int:
        """The fake score's."""
        return self.fake_passes

    @property
    def fake_passes(self) -> int:
        """Forward and backward passes of the fake score for a sample: consistency looks one step ahead, twice."""
        return 3 if self.consistency else 1

    @property
    def teacher_passes(self) -> int:
        """Forward passes of the teacher for a sample."""
        return 2 if self.teacher_guidance != 1 else 1


class ACDMDSettings(MatchingSettings):
    type: Literal["acdmd"] = "acdmd"
    """The method; "acdmd" is AC-DMD, RTDMD's distillation to a few steps, which needs no reward."""
    fake_updates: int = Field(default=10, ge=1, le=LEVELS)
    """Updates of the fake score for each of the student's."""

    learner: ClassVar[str] = "flowtilt.training.rtdmd.distil:begin"
    decodes: ClassVar[bool] = False
    made: ClassVar[str] = "distilled"
    scores: ClassVar[bool] = False
    progress: ClassVar[tuple[str, str]] = ("teacher_gap", "teacher gap")
    hold: ClassVar[str] = "lower objective.teacher_guidance"

    def check(self, recipe: "Recipe") -> None:
        if trained := trained_rewards(recipe):
            raise ValueError(f"rewards.{trained[0]}: acdmd trains on no reward; give it the weight 0, which measures it")
        if recipe.tags == "auto" or recipe.prompts_by != "turn":
            raise ValueError('tags, prompts_by: acdmd has no rewards to choose prompts by; leave "auto" and "variance" out')
        self.check_few_steps(recipe)
        if recipe.lora.on:
            raise ValueError("lora.on: acdmd distils the base itself, and its fake score begins there; leave it out, or see lora.init")
        if recipe.optimizer.steps_per_rollout > 1:
            raise ValueError("optimizer.steps_per_rollout: acdmd makes one update of the student a step; see objective.fake_updates")

    def passes(self, recipe: "Recipe", step: int) -> Passes:
        """Each sample stops after 1 to S steps, all equally often but for what is left where S does not divide the images."""
        r = recipe.rollout
        images = r.images()
        simulated = sum(k % r.steps + 1 for k in range(images))
        return Passes(
            sample=(self.fake_updates + 1) * simulated,
            pairs=images * (self.fake_updates * self.fake_passes + 1),
            old=images,  # the fake score's in the student's update
            reference=images * self.teacher_passes,
        )


class RTDMDSettings(MatchingSettings):
    type: Literal["rtdmd"] = "rtdmd"
    """The method; "rtdmd" reinforces a few-step student: SubGRPO on some steps, reward back-propagation and AC-DMD on the last."""
    trained_steps: int = Field(default=2, ge=1, le=LEVELS)
    """Stochastic steps that the policy gradient trains, chosen anew each rollout; in the others a prompt's images share their noise."""
    clip_range: float = Field(default=1e-5, gt=0, le=NO_CLIP)
    """The likelihood ratio counts up to 1 plus and minus this; without effect in a rollout's first update, where it is 1."""
    advantage_clip: float = Field(default=5.0, gt=0, le=NO_CLIP)
    """Advantages beyond this many standard deviations count as this many."""
    matching: float = Field(default=1e-3, ge=0, le=WEIGHT)
    """Weight of AC-DMD's gradient on the last step; 0 leaves out the fake score."""
    backprop: dict[str, Weight] = Field(default_factory=dict)
    """Rewards of `[rewards]` that the last step follows by their gradient, name = weight; each must be differentiable."""
    backprop_scale: float = Field(default=1e-4, gt=0, le=WEIGHT)
    """Weight of their sum R in the loss."""
    margin: Weight | None = None
    """The loss is max(margin - R, 0): an image at the margin is left alone; none follows R without end. Published: 3.0."""
    fake: str | None = Field(default=None, min_length=1)
    """The LoRA from which the fake score goes on; none takes `fake` of the last run in `lora.on`."""

    learner: ClassVar[str] = "flowtilt.training.rtdmd.reinforce:begin"
    most_lag: ClassVar[int] = 1
    """SubGRPO's ratios are stored and the last step is evaluated anew, but the fake score learns the student of a rollout before."""
    hold: ClassVar[str] = "raise objective.matching"

    @field_validator("fake")
    @classmethod
    def _with_whole_path(cls, fake: str | None) -> str | None:
        return fake and absolute(fake)

    def check(self, recipe: "Recipe") -> None:
        super().check(recipe)
        self.check_few_steps(recipe)
        steps = recipe.rollout.steps
        if self.trained_steps >= steps:
            raise ValueError(
                f"objective.trained_steps: of {steps} steps {steps - 1} are stochastic and can be trained, not {self.trained_steps}"
            )
        check_followed(recipe, "objective.backprop", self.backprop)

    @property
    def other_roles(self) -> int:
        """The fake score, where it is asked."""
        return 1 if self.matching else 0

    @property
    def followed(self) -> Sequence[str]:
        """Those of `backprop`."""
        return tuple(name for name, weight in self.backprop.items() if weight)

    def kept_steps(self, steps: int) -> int:
        return steps - 1

    def rows_per_image(self, steps: int) -> int:
        return self.trained_steps + 1

    def passes(self, recipe: "Recipe", step: int) -> Passes:
        r, updates = recipe.rollout, recipe.optimizer.steps_per_rollout
        images = r.images()
        # the last step anew, once an update has moved the weights that sampled it
        again = images if r.lag and step > 1 else images - images // updates
        return Passes(
            sample=images * r.steps + again,
            pairs=images * (self.trained_steps + 1 + (self.fake_passes if self.matching else 0)),
            old=images if self.matching else 0,
            reference=images * self.teacher_passes if self.matching else 0,
        )
