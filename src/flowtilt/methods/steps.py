"""What the methods share that train a rollout's own stochastic steps."""

from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import BeforeValidator, Field

from flowtilt.methods.base import LEVELS, MOST_LAG, ROLLOUTS, WEIGHT, Passes, as_tuple, sampled
from flowtilt.methods.guide import GuideSettings

if TYPE_CHECKING:
    from flowtilt.config import Recipe


class StepSettings(GuideSettings):
    """A method that declares a key `kl` is pulled to the reference by kl times `objectives.grpo.path_kl`."""

    type: Any = ""
    """The method's own word; named here so that it comes first."""
    sde: Literal["flow", "dance", "cps"] = "flow"
    """The stochastic step: FlowGRPO's, DanceGRPO's, or the coefficient-preserving one."""
    eta: float = Field(default=0.7, gt=0, le=WEIGHT)
    """How noisy that step is; "cps" has all noise new at 1."""
    window: Literal["all", "random", "sliding"] = "all"
    """Steps that are stochastic and trained: all of `span`, FlowGRPO-Fast's few anywhere in it, or MixGRPO's, which move on."""
    window_size: int = Field(default=2, ge=1, le=LEVELS)
    """Steps of a window."""
    window_every: int = Field(default=25, ge=1, le=ROLLOUTS)
    """Rollouts after which a sliding window moves on by one step."""
    span: Annotated[tuple[int, int] | None, BeforeValidator(as_tuple)] = None
    """First step that may be stochastic and one past the last; none leaves out only the last step, which follows the ODE."""

    kl_of_velocities: ClassVar[bool] = False
    most_lag: ClassVar[int] = MOST_LAG
    """The ratio's log-densities are stored with the steps, and its clip bounds what they allow."""
    guided_training: ClassVar[bool] = True

    @property
    def reference(self) -> bool:
        """Whether the reference is evaluated, one forward pass per trained step."""
        return self.pull > 0

    def spanned(self, steps: int) -> tuple[int, int]:
        """`span` for a sampler of so many steps."""
        return self.span or (0, max(1, steps - 1))

    def kept_steps(self, steps: int) -> int:
        first, end = self.spanned(steps)
        return end - first if self.window == "all" else self.window_size

    def rows_per_image(self, steps: int) -> int:
        return self.kept_steps(steps)

    def check(self, recipe: "Recipe") -> None:
        super().check(recipe)
        steps = recipe.rollout.steps
        if recipe.rollout.solver == "cps":
            raise ValueError(
                f"rollout.solver: 'cps' is not for {self.type}, which has stochastic steps of its own; "
                'set objective.sde = "cps" and an ODE solver for the steps between'
            )
        if self.guided and recipe.rollout.guidance != 1:
            raise ValueError("objective.guide: teaches to sample without guidance; set rollout.guidance to 1")
        first, end = self.spanned(steps)
        if not 0 <= first < end <= steps:
            raise ValueError(f"objective.span: {first} to {end} does not lie within the rollout's {steps} steps")
        if self.window != "all" and self.window_size > end - first:
            raise ValueError(f"objective.window_size: {self.window_size} steps do not fit into the {end - first} from {first} to {end}")
        if self.sde == "cps" and self.eta > 1:
            raise ValueError("objective.eta: cps replaces the whole noise at 1, which is its greatest")
        if self.sde == "cps" and end == steps:
            raise ValueError(f"objective.span: the last step of cps is deterministic and has no density; end at {steps - 1}")

    def passes(self, recipe: "Recipe", step: int) -> Passes:
        # guided steps are trained guided, and what the collecting policy said is stored
        pairs = recipe.rollout.trained() * recipe.rows_per_image() * (2 if recipe.rollout.guidance != 1 else 1)
        # the collecting policy equals the current one before the first update
        asking = 1 - (1 / recipe.optimizer.steps_per_rollout if step == 1 or not recipe.rollout.lag else 0)
        old = self.guide_old(pairs, step, asking)
        return Passes(sample=sampled(recipe), pairs=pairs, old=old, reference=self.reference_passes(pairs, step))
