"""A value with an interval around it: the one type for everything that a page, a table or a JSON file says of a score."""

import math
from typing import Any, NamedTuple

FEWEST = 10
"""Prompts below which no interval is given: a bootstrap over fewer is too narrow to call anything significant."""

KINDS = BOOTSTRAP, EXACT, FEW, THIN, ALIKE, UNKNOWN = "", "exact", "few", "thin", "alike", "unknown"
"""What `Estimate.kind` can be."""


class Estimate(NamedTuple):
    """A value and the interval around it, NaN where there is none.

    Args:
        value: a mean, or a median over seeds.
        low, high: the ends of its 95 % interval; over seeds the lowest and the highest.
        kind: "" for an interval by the rule (a bootstrap over prompts) or over seeds; "exact" where all prompts scored alike and
            the exact bound over prompts stands in. Without an interval it says why: "few" (fewer than 10 prompts), "thin" (a
            mean over tags, and tags have too few prompts), "alike" (all prompts scored alike, and the score's range is not known),
            "unknown" (scores per prompt are not known).
        prompts: that have a score, 0 where not known.
        images: all of them, 0 where not known; `missing` of these have no score.
    """

    value: float
    low: float = math.nan
    high: float = math.nan
    kind: str = BOOTSTRAP
    prompts: int = 0
    images: int = 0
    missing: int = 0

    @property
    def known(self) -> bool:
        return math.isfinite(self.value)

    @property
    def has_interval(self) -> bool:
        return math.isfinite(self.low) and math.isfinite(self.high)

    @property
    def side(self) -> int:
        """Of a difference: 1 or -1 where its interval lies above or below 0, else 0."""
        if not self.has_interval:
            return 0
        return 1 if self.low > 0 else -1 if self.high < 0 else 0

    @property
    def why_none(self) -> str:
        """Why there is no interval, in words; "" where there is one, or no value."""
        if self.has_interval or not self.known:
            return ""
        few = f"{self.prompts} {'prompt' if self.prompts == 1 else 'prompts'}" if self.prompts else "too few prompts"
        return {
            FEW: f"{few}, at least {FEWEST} are needed",
            THIN: "tags have too few prompts",
            ALIKE: "all prompts scored alike, and the score's range is not known",
        }.get(self.kind, "scores per prompt are not known")

    def json(self) -> dict[str, Any]:
        """{"mean", "low", "high"} as JSON, None for what is not known, and "interval": the kind, where there is one to name."""
        ends = {"mean": self.value, "low": self.low, "high": self.high}
        found: dict[str, Any] = {name: value if math.isfinite(value) else None for name, value in ends.items()}
        return found | ({"interval": self.kind} if self.kind else {})


NOTHING = Estimate(math.nan)
"""No value."""
