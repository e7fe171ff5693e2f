"""MEND, arXiv 2610.05954: each sample is improved along a differentiable reward's gradient, then regressed on; see objectives/mend.py."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

from pydantic import BeforeValidator, Field

from flowtilt.methods.base import WEIGHT, Method, Passes, Weight, as_tuple, check_followed, sampled

if TYPE_CHECKING:
    from flowtilt.config import Recipe


class MendSettings(Method):
    type: Literal["mend"] = "mend"
    """The method; "mend" is MEND, which regresses on samples improved along a reward's gradient."""
    improve: dict[str, Weight] = Field(default_factory=dict)
    """Rewards of `[rewards]` along whose gradient samples are improved, name = weight; each must be differentiable."""
    moves: Annotated[tuple[float, ...], BeforeValidator(as_tuple)] = (0.1, 0.2, 0.4)
    """Lengths of the moves that are tried, as root mean squares in units of the latents."""
    quantile: float = Field(default=0.75, ge=0, le=1)
    """Improvement beyond this quantile of a prompt's rewards earns nothing more."""
    tau: float = Field(default=1.0, gt=0, le=WEIGHT)
    """A move of mean square m costs m / (2 tau); adapted each rollout, so that 30 to 60 % of the images accept one. This is its start."""
    keep: float = Field(default=10.0, ge=0, le=WEIGHT)
    """Weight of the images that accept no move, which stay where they are."""
    level: float = Field(default=0.278, gt=0, le=1)
    """Noise level of the state that is trained: the rollout's own state nearest to it."""

    learner: ClassVar[str] = "flowtilt.training.mend:begin"
    hold: ClassVar[str] = "raise objective.keep"
    trains_all_weights: ClassVar[bool] = False
    kl_of_velocities: ClassVar[bool] = False

    def check(self, recipe: "Recipe") -> None:
        super().check(recipe)
        if not self.followed:
            raise ValueError("objective.improve: names no reward, so there is nothing to improve samples by; set { pickscore = 1.0 }")
        check_followed(recipe, "objective.improve", self.improve)
        if not self.moves or not all(0 < move <= WEIGHT for move in self.moves):
            raise ValueError("objective.moves: needs at least one length, each above 0")
        r = recipe.rollout
        if r.solver != "euler":
            raise ValueError(f'rollout.solver: mend trains a state on the way of "euler", which "{r.solver}" doesn\'t keep')
        if r.guidance != 1:
            raise ValueError("rollout.guidance: mend trains the velocity without guidance; set it to 1")
        if recipe.shard == "base":
            raise ValueError('shard: mend does not go with "base" yet; set it to "none"')

    @property
    def followed(self) -> Sequence[str]:
        """Those of `improve`."""
        return tuple(name for name, weight in self.improve.items() if weight)

    @property
    def trials(self) -> int:
        """One a move."""
        return len(self.moves)

    def kept_steps(self, steps: int) -> int:
        return 1

    def passes(self, recipe: "Recipe", step: int) -> Passes:
        images, updates = recipe.rollout.trained(), recipe.optimizer.steps_per_rollout
        # the collecting policy is the current one until the first update
        return Passes(sample=sampled(recipe), pairs=images, old=images - images // updates, reference=0)
