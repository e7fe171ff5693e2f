"""The `[objective]` tables of a recipe, one a method, and what all tables of a recipe share.

Defaults are the published values. The method's file in `objectives/` says what a number does, and where
the paper, its code and flowtilt differ.
"""

from typing import Annotated, Any, ClassVar, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, field_validator

from flowtilt.sources import absolute

WEIGHT = 1e6
"""Bound of weights, scales and rates: far above any that makes sense, far below what overflows in fp32."""
NO_CLIP = 1e12
"""Bound of what something is clipped at, so that it may be set to where nothing is clipped."""
LEVELS = 10_000
"""Bound of steps of a sampler, and of what is counted beside them."""
ROLLOUTS = 1_000_000_000
"""Bound of rollouts, and of what counts them."""
Weight = Annotated[float, Field(ge=-WEIGHT, le=WEIGHT)]


class Settings(BaseModel):
    """One table: unknown keys and NaN are errors, nothing changes once it was checked, field docs are what `flowtilt keys` shows."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True, validate_default=True, allow_inf_nan=False)


class ForwardSettings(Settings):
    """What the methods on the forward process share: clean samples, each trained at several noise levels."""

    type: Any
    """The method's own word; named here so that it comes first."""
    norm_guard: float = Field(default=0.0, ge=0, le=WEIGHT)
    """Weight of NormGuard's hinge (arXiv 2606.27771): the mean square by which |v| exceeds |v_ref|."""
    old_policy: Literal["copy", "linear", "short", "delayed"] = "linear"
    """Decay of the collecting policy at optimizer step s: 0; min(.001 s, .5); min(.001 s, .3); 0, from 75 on min(.0075 (s - 75), .999)."""
    times: Literal["rollout", "stratified"] = "rollout"
    """Training times of an image: the rollout's own noise levels in random order, or uniform in equal strata and shifted alike."""
    times_per_image: int = Field(default=9, ge=1, le=LEVELS)
    """Noise levels at which each image is trained a rollout."""


class AdvantageSettings(ForwardSettings):
    """What the methods share that weigh an image's error by its advantage."""

    kl: float = Field(default=1e-4, ge=0, le=WEIGHT)
    """Weight of mean (v - v_ref)^2; 0 saves the reference's forward pass."""
    consistency: float = Field(default=0.0, ge=0, le=WEIGHT)
    """Added to every advantage, in its unit: flow matching on the policy's own images, which keeps it from drifting."""

    @property
    def reference(self) -> bool:
        """Whether the reference is asked, one forward pass a pair of image and time."""
        return self.kl > 0 or self.norm_guard > 0


class NFTSettings(AdvantageSettings):
    type: Literal["nft"] = "nft"
    """The method; "nft" is DiffusionNFT, arXiv 2509.16117."""
    beta: float = Field(default=1.0, gt=0, le=WEIGHT)
    """How far the implicit positive and negative velocities stand from the old policy's."""
    advantage_clip: float = Field(default=5.0, gt=0, le=NO_CLIP)
    """Advantages beyond this many standard deviations count as this many."""
    adaptive: bool = True
    """Divide each squared error of x0 by its mean absolute error, as published; false has the plain square, small near data."""


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
    """Noise levels at which each image is trained a rollout."""


class ELBOSettings(AdvantageSettings):
    """What the three policy gradients on the evidence lower bound share."""

    scale: float = Field(default=0.1, gt=0, le=WEIGHT)
    """Multiplies advantages, which the authors' code takes without a standard deviation: `advantage = "none"`."""
    ratio: bool = True
    """Importance weights exp(elbo - elbo_old); false has 1."""


class EPGSettings(ELBOSettings):
    type: Literal["epg"] = "epg"
    """The method; "epg" is the policy gradient on the evidence lower bound."""


class PEPGSettings(ELBOSettings):
    type: Literal["pepg"] = "pepg"
    """The method; "pepg" is "epg" with advantages that pay for what the policy has moved."""


class PARSettings(ELBOSettings):
    type: Literal["par"] = "par"
    """The method; "par" regresses the lower bound's gain on the advantage; "pepg" in another form."""


class RAMSettings(ForwardSettings):
    type: Literal["ram"] = "ram"
    """The method; "ram" is reinforce adjoint matching, arXiv 2605.10759."""
    multiplier: float = Field(default=50.0, gt=0, le=WEIGHT)
    """m: the reference is tilted by exp(m reward), for rewards in their own unit: `advantage = "none"`. One over the KL's temperature."""
    old_policy: Literal["copy", "linear", "short", "delayed"] = "copy"
    """As for "nft"; "copy" draws from the trained policy, as published."""

    @property
    def reference(self) -> bool:
        """Always: it is in the target."""
        return True


class GRPOSettings(Settings):
    type: Literal["grpo"] = "grpo"
    """The method; "grpo" is FlowGRPO, arXiv 2505.05470: a policy gradient over stochastic steps of the rollout."""
    sde: Literal["flow", "dance", "cps"] = "flow"
    """The stochastic step: FlowGRPO's, DanceGRPO's, or the coefficient-preserving one."""
    eta: float = Field(default=0.7, gt=0, le=WEIGHT)
    """How noisy that step is; "cps" has all noise new at 1."""
    clip_range: float = Field(default=1e-4, gt=0, le=NO_CLIP)
    """The likelihood ratio counts up to 1 plus and minus this; small, since log p is a mean over a latent's values."""
    kl: float = Field(default=0.04, ge=0, le=WEIGHT)
    """Weight of the distance of a step's mean from the reference's: .04 for GenEval and OCR, .01 for PickScore; 0 saves that pass."""
    window: Literal["all", "random", "sliding"] = "all"
    """Steps that are stochastic and trained: all of `span`, FlowGRPO-Fast's few anywhere in it, or MixGRPO's, which move on."""
    window_size: int = Field(default=2, ge=1, le=LEVELS)
    """Steps of a window."""
    window_every: int = Field(default=25, ge=1, le=ROLLOUTS)
    """Rollouts after which a sliding window moves on by one step."""
    span: tuple[int, int] | None = None
    """First step that may be stochastic and one past the last; none leaves out only the last step, which follows the ODE."""
    advantage_clip: float = Field(default=5.0, gt=0, le=NO_CLIP)
    """Advantages beyond this many standard deviations count as this many."""
    guard: bool = False
    """GRPO-Guard (arXiv 2510.22319): one distribution of ratios and one weight for all steps; wants a clip_range of its own."""

    @field_validator("span", mode="before")
    @classmethod
    def _pair(cls, value: Any) -> Any:
        return tuple(value) if isinstance(value, list) else value  # TOML's arrays are lists

    @property
    def reference(self) -> bool:
        """Whether the reference is asked, one forward pass a trained step."""
        return self.kl > 0

    def spanned(self, steps: int) -> tuple[int, int]:
        """`span` for a sampler of so many steps."""
        return self.span or (0, max(1, steps - 1))

    def trained_steps(self, steps: int) -> int:
        """How many of a sampler's steps are trained each rollout."""
        first, end = self.spanned(steps)
        return end - first if self.window == "all" else self.window_size

    def check(self, steps: int) -> None:
        """Raises ValueError, which names the key, for what can't be done with a sampler of so many steps."""
        first, end = self.spanned(steps)
        if not 0 <= first < end <= steps:
            raise ValueError(f"objective.span: {first} to {end} does not lie within the rollout's {steps} steps")
        if self.window != "all" and self.window_size > end - first:
            raise ValueError(f"objective.window_size: {self.window_size} steps do not fit into the {end - first} from {first} to {end}")
        if self.sde == "cps" and self.eta > 1:
            raise ValueError("objective.eta: cps replaces the whole noise at 1, which is its greatest")
        if self.sde == "cps" and end == steps:
            raise ValueError(f"objective.span: the last step of cps is deterministic and has no density; end at {steps - 1}")


class MatchingSettings(Settings):
    """What RTDMD's two stages share (arXiv 2605.26108): a student of few steps meets its teacher in distribution."""

    type: Any
    """The method's own word; named here so that it comes first."""
    teacher_guidance: float = Field(default=4.5, ge=1, le=WEIGHT)
    """Classifier-free guidance of the teacher, the bare base; the student never has any."""
    fake_lr: float = Field(default=3e-5, gt=0, le=WEIGHT)
    """Constant learning rate of the fake score, which learns what the student draws; `[optimizer]` has the student's."""
    consistency: float = Field(default=0.01, ge=0, le=WEIGHT)
    """Weight of the fake score's consistency along steps of cps; 0 saves two of its three forward and backward passes."""
    consistency_span: float = Field(default=0.2, gt=0, le=1)
    """Such a step goes down by up to this much in t."""
    normaliser: Literal["noisy", "mean"] = "noisy"
    """What divides a sample's gradient: its distance from the teacher's projection as drawn, with noise in it, or without."""


class ACDMDSettings(MatchingSettings):
    type: Literal["acdmd"] = "acdmd"
    """The method; "acdmd" is AC-DMD, RTDMD's distillation to a few steps, which needs no reward."""
    fake_updates: int = Field(default=10, ge=1, le=LEVELS)
    """Updates of the fake score for each of the student's."""

    reference: ClassVar[bool] = False


class RTDMDSettings(MatchingSettings):
    type: Literal["rtdmd"] = "rtdmd"
    """The method; "rtdmd" reinforces a few-step student: SubGRPO on some steps, reward back-propagation and AC-DMD on the last."""
    trained_steps: int = Field(default=2, ge=1, le=LEVELS)
    """Stochastic steps that the policy gradient trains, drawn anew each rollout; in the others a prompt's images share their noise."""
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

    reference: ClassVar[bool] = False

    @field_validator("fake")
    @classmethod
    def _with_whole_path(cls, fake: str | None) -> str | None:
        return fake and absolute(fake)


def _nft_unless_said(value: Any) -> Any:
    """A table without a type is DiffusionNFT's, as it was when there was no other."""
    return {"type": "nft", **value} if isinstance(value, dict) else value


ObjectiveSettings = Annotated[
    Annotated[
        NFTSettings | AWMSettings | EPGSettings | PEPGSettings | PARSettings | RAMSettings | GRPOSettings | ACDMDSettings | RTDMDSettings,
        Field(discriminator="type"),
    ],
    BeforeValidator(_nft_unless_said),
]
