"""Diffusion-DPO, arXiv 2311.12908, on flow matching: "dpo" makes pairs of its own rollouts, "dpo-offline" reads them.

The loss: objectives/dpo.py.

`beta` belongs to errors that are means over a latent's values. Published figures: Diffusion-DPO's code has 5000 (whole weights,
2,048 pairs per update, learning rate 2e-5); flow_grpo's and Flow-Factory's online presets have 100 (LoRA, learning rates 3e-4 and 1e-5).
"""

import os
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field, field_validator

from flowtilt.methods.base import LEVELS, MOST_LAG, WEIGHT, Guard, Method, Passes, sampled, trained_rewards

if TYPE_CHECKING:
    from flowtilt.config import Recipe

PLAYGROUND = "playground"
"""Pairs of this name are sampled from the playground's base when they are first asked for."""
WORSE = 0.05
"""Share of the reference's error. Offline DPO on the playground improves up to .05, not above (docs/guides/offline-pairs.md)."""
ROLLOUTS_WORSE = 5
"""A step sees few pairs at few noise levels: one of them says little."""


def winner_gets_worse(metrics: Mapping[str, float]) -> str | None:
    """The message where the chosen images' error lies above the reference's by a share of `WORSE`; none otherwise."""
    worse, error = metrics.get("winner_worse", 0.0), metrics.get("winner_error", 0.0)  # absent where no update was made
    if not worse > WORSE * (error - worse):
        return None
    return (
        f"the chosen images' error is {worse:.2g} above the reference's ({error - worse:.2g}): the policy unlearns them, and the loss "
        "falls only since it unlearns the rejected ones faster. Raise objective.hold_winner or objective.beta, or lower optimizer.lr"
    )


class PairSettings(Method):
    """What online and offline DPO share: a chosen and a rejected image of one prompt, compared at one noise level with one noise."""

    type: Any = ""
    """The method's own word; named here so that it comes first."""
    beta: float = Field(default=100.0, gt=0, le=WEIGHT)
    """Higher values stay closer to the reference. It belongs to errors that are means over a latent's values, not sums."""
    hold_winner: float = Field(default=0.0, ge=0, le=WEIGHT)
    """Weight of the chosen image's own matching error, which keeps it from getting worse; 0 as published."""
    times: Literal["logit_normal", "stratified"] = "logit_normal"
    """Noise levels of a pair: the sigmoid of a normal number, as published, or uniform in equal strata; both shifted as the model's are."""
    times_per_pair: int = Field(default=1, ge=1, le=LEVELS)
    """Noise levels at which each pair is trained per rollout."""

    hold: ClassVar[str] = "raise objective.beta"

    @property
    def reference(self) -> bool:
        """Always: a pair is judged by how both errors moved from the reference's."""
        return True

    def guards(self) -> Mapping[str, Guard]:
        return {"winner": Guard(ROLLOUTS_WORSE, winner_gets_worse)}

    def rows_per_image(self, steps: int) -> int:
        return self.times_per_pair

    def _trained(self, recipe: "Recipe", sample: int) -> Passes:
        rows = 2 * recipe.rollout.prompts * self.times_per_pair
        return Passes(sample=sample, pairs=rows, old=0, reference=rows)

    def check_updates(self, recipe: "Recipe") -> None:
        """As `check`, for the updates of a rollout: each needs a pair."""
        updates, pairs = recipe.optimizer.steps_per_rollout, recipe.rollout.prompts
        if updates > pairs:
            raise ValueError(f"optimizer.steps_per_rollout: {updates} updates for {pairs} pairs per rollout; each needs one at least")


class OnlineDPOSettings(PairSettings):
    type: Literal["dpo"] = "dpo"
    """The method; "dpo" is online DPO: the best against the worst image of each prompt of a rollout."""

    learner: ClassVar[str] = "flowtilt.training.dpo.online:begin"
    most_lag: ClassVar[int] = MOST_LAG
    """Pairs are compared with the reference, whoever sampled them."""

    def check(self, recipe: "Recipe") -> None:
        super().check(recipe)
        self.check_updates(recipe)

    def passes(self, recipe: "Recipe", step: int) -> Passes:
        """Where every prompt's images differ in their reward."""
        return self._trained(recipe, sampled(recipe))


class OfflineDPOSettings(PairSettings):
    type: Literal["dpo-offline"] = "dpo-offline"
    """The method; "dpo-offline" is Diffusion-DPO (arXiv 2311.12908) on pairs of images from a file; nothing is sampled."""
    beta: float = Field(default=5000.0, gt=0, le=WEIGHT)
    """As for "dpo"; 5000 is Diffusion-DPO's published value."""
    pairs: str = Field(default="", max_length=4096)
    """Pairs: .jsonl, HPDv3 .json, Pick-a-Pic .parquet or a folder of them (docs/guides/offline-pairs.md). "playground" samples its own."""

    learner: ClassVar[str] = "flowtilt.training.dpo.offline:begin"
    made: ClassVar[str] = "trained on pairs of images"
    samples: ClassVar[bool] = False
    scores: ClassVar[bool] = False
    progress: ClassVar[tuple[str, str]] = ("accuracy", "accuracy")

    @field_validator("pairs")
    @classmethod
    def _with_whole_path(cls, pairs: str) -> str:
        """A run goes on from anywhere."""
        return os.path.abspath(pairs) if pairs and pairs != PLAYGROUND and os.path.exists(pairs) else pairs

    def check(self, recipe: "Recipe") -> None:
        from flowtilt.config.held_out import SPLIT  # the package reads methods first

        if not self.pairs:
            raise ValueError('objective.pairs: name a file of pairs, as objective.pairs = "pairs.jsonl" (docs/guides/offline-pairs.md)')
        if self.pairs == PLAYGROUND and recipe.prompts not in SPLIT:
            raise ValueError(
                f'objective.pairs: "{PLAYGROUND}" is for prompts = "{PLAYGROUND}" alone; a file of that name is given as ./{PLAYGROUND}'
            )
        if recipe.tags == "auto" or recipe.prompts_by != "turn":
            raise ValueError('tags, prompts_by: dpo-offline takes its prompts from the pairs; leave "auto" and "variance" out')
        if trained := trained_rewards(recipe):
            raise ValueError(f"rewards.{trained[0]}: dpo-offline trains on no reward; give it the weight 0, which measures it")
        if recipe.rollout.images_per_prompt != 2:
            raise ValueError("rollout.images_per_prompt: set it to 2, the images of a pair; a step takes rollout.prompts pairs")
        self.check_updates(recipe)

    def passes(self, recipe: "Recipe", step: int) -> Passes:
        return self._trained(recipe, 0)
