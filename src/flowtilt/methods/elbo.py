"""Policy gradients on the evidence lower bound: EPG, PEPG and PAR. The losses: objectives/elbo.py."""

from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field

from flowtilt.methods.base import WEIGHT, Contrast
from flowtilt.methods.forward import AdvantageSettings

if TYPE_CHECKING:
    from flowtilt.config import Recipe


class ELBOSettings(AdvantageSettings):
    """What the three share."""

    scale: float = Field(default=0.1, gt=0, le=WEIGHT)
    """Multiplies advantages, which the authors' code takes without a standard deviation: `advantage = "none"`."""
    ratio: bool = True
    """Importance weights exp(elbo - elbo_old); false has 1."""

    def check(self, recipe: "Recipe") -> None:
        super().check(recipe)
        if recipe.rollout.lag and not self.ratio:
            raise ValueError("rollout.lag: nothing corrects for an older policy's images; set objective.ratio = true, or lag = 0")


class EPGSettings(ELBOSettings):
    type: Literal["epg"] = "epg"
    """The method; "epg" is the policy gradient on the evidence lower bound."""

    objective: ClassVar[str] = "flowtilt.objectives.elbo:EPG"

    @property
    def contrast(self) -> Contrast | None:
        """None without importance weights, which are all that compares with the old policy."""
        return Contrast("log_ratio", "importance weights are all 1") if self.ratio else None


class PEPGSettings(ELBOSettings):
    type: Literal["pepg"] = "pepg"
    """The method; "pepg" is "epg" with advantages that pay for what the policy has moved."""

    objective: ClassVar[str] = "flowtilt.objectives.elbo:PEPG"

    @property
    def contrast(self) -> Contrast:
        return Contrast("log_ratio", "advantages pay for no move and this is epg")


class PARSettings(ELBOSettings):
    type: Literal["par"] = "par"
    """The method; "par" regresses the lower bound's gain on the advantage; "pepg" in another form."""

    objective: ClassVar[str] = "flowtilt.objectives.elbo:PAR"

    @property
    def contrast(self) -> Contrast:
        return Contrast("log_ratio", "there is no gain to regress and this is epg")
