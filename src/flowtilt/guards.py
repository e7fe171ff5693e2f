"""Alarms that act: each says once what happened, what it means and what to change."""

from collections.abc import Mapping
from dataclasses import dataclass, field

NO_VARIANCE_SHARE = 0.9
NO_VARIANCE_ROLLOUTS = 5
NO_CONTRAST_ROLLOUTS = 3
FIRED = -1


@dataclass
class Guards:
    """Watches one run's metrics; `state` is all it remembers and goes into checkpoints."""

    state: dict[str, int] = field(default_factory=dict)

    def check(self, metrics: Mapping[str, float]) -> dict[str, str]:
        """Alarms that fire for the first time in this rollout: name -> message."""
        lost = [
            f"{name.removeprefix('missing/')} gave no score to {value:.0f} of this rollout's images"
            for name, value in metrics.items()
            if name.startswith("missing/") and value > 0
        ]
        seen = {
            "nan": (metrics.get("skipped_updates", 0) > 0, 1, NAN),
            "no_variance": (metrics["groups/without_variance"] >= NO_VARIANCE_SHARE, NO_VARIANCE_ROLLOUTS, NO_VARIANCE),
            "missing": (bool(lost), 1, f"{'; '.join(lost)}. {MISSING}"),
            "no_contrast": (metrics.get("deviation") == 0, NO_CONTRAST_ROLLOUTS, NO_CONTRAST),
        }
        fired = {}
        for name, (bad, patience, message) in seen.items():
            in_a_row = self.state.get(name, 0)
            if in_a_row == FIRED:
                continue
            in_a_row = in_a_row + 1 if bad else 0
            if in_a_row == patience:
                fired[name] = message
                in_a_row = FIRED
            self.state[name] = in_a_row
        return fired


NAN = (
    "the loss or its gradient is not finite; the update was left out. "
    'Lower optimizer.lr, or use model.dtype = "bfloat16" instead of float16'
)
NO_VARIANCE = (
    f"for {NO_VARIANCE_ROLLOUTS} rollouts nearly every prompt gave images of equal reward, so there is nothing to compare. "
    "A reward of 0 everywhere is likely broken or too hard, one near its maximum is learnt; otherwise raise rollout.images_per_prompt"
)
MISSING = (
    "They were left out of their groups, which is no zero. "
    "metrics.jsonl goes on counting them as missing/<reward>; many of them mean that the reward or its server needs a look"
)
NO_CONTRAST = (
    f"v_theta = v_old in every update of {NO_CONTRAST_ROLLOUTS} rollouts, "
    "so objective.beta does nothing and this is plain advantage-weighted matching. "
    'Set objective.old_policy = "linear" or optimizer.steps_per_rollout = 2'
)
