"""The guide: a pull of v to the policy's own guided velocity, which teaches the policy to do without guidance."""

from typing import Any, Literal

from pydantic import Field

from flowtilt.methods.base import WEIGHT, Method
from flowtilt.methods.schedule import Schedule, value_at


class GuideSettings(Method):
    type: Any = ""
    """The method's own word; named here so that it comes first."""
    guide: Schedule = 0.0
    """Weight of the pull to a guided velocity, beside the method's own loss: a number, or points [[rollout, weight], ...]."""
    guide_of: Literal["old", "reference"] = "old"
    """Whose velocity is guided: the collecting policy's, where guidance adds up while the pull lasts, or the base's, for one more pass."""
    guide_scale: float = Field(default=2.0, gt=1, le=WEIGHT)
    """Guidance scale s of the guide's target: v_old + (s - 1)(v_old - v_ref of no words), or v_ref guided by s."""
    guide_share: float = Field(default=0.3, gt=0, le=1)
    """Share of the rows that carry the pull, with the inverse as their weight; each costs a forward pass."""
    guide_from: float = Field(default=0.5, ge=0, lt=1)
    """Least noise level of these rows."""
    reference_guidance: float = Field(default=1.0, ge=1, le=WEIGHT)
    """Guidance scale of the reference in the pull `kl`, for a base that is sampled with guidance; above 1 each pass of it costs two."""

    @property
    def pull(self) -> float:
        """Weight of the distance to the reference: the method's key `kl`, 0 for a method without one."""
        return getattr(self, "kl", 0.0)

    @property
    def guided(self) -> bool:
        """Whether any rollout has a guide."""
        return any(weight for _, weight in self.guide) if isinstance(self.guide, tuple) else self.guide > 0

    def reference_passes(self, pairs: int, step: int) -> int:
        """Forward passes of the reference in rollout `step`, from 1, of so many trained rows, on average over even noise levels."""
        pull = round(pairs * getattr(self, "reference_share", 1.0)) * (2 if self.reference_guidance != 1 else 1) if self.reference else 0
        return pull + self.guide_rows(pairs, step) * (2 if self.guide_of == "reference" else 1)

    def guide_rows(self, pairs: int, step: int) -> int:
        """Rows that carry the guide in rollout `step`, from 1, of so many trained ones, on average over even noise levels."""
        return round(pairs * self.guide_share * self.levels_from(self.guide_from)) if self.guide_weight(step - 1) else 0

    def guide_old(self, pairs: int, step: int, asking: float) -> int:
        """Forward passes of the collecting policy for the guide's target, where the loss has none; a share `asking` of its rows asks."""
        return round(self.guide_rows(pairs, step) * asking) if self.guide_of == "old" else 0

    def levels_from(self, level: float) -> float:
        """Share of the trained noise levels that are no less than `level`, where they are even."""
        return 1 - level

    def guide_weight(self, rollout: int) -> float:
        """The guide's weight in rollout number `rollout`, from 0."""
        return value_at(self.guide, rollout)
