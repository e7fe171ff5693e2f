"""What each guard looks for, and what it says. A threshold's reason stands with it; docs/reference/metrics.md has them on one page."""

from collections.abc import Callable, Mapping
from math import isfinite
from typing import NamedTuple

from flowtilt.config import Recipe
from flowtilt.methods import own
from flowtilt.training.guards.history import BLOCK, TRAINED, Fall, History

NO_VARIANCE = 0.9
"""Share of groups without variance. Where a playground run of 200 rollouts has learnt its task it is .83 at most."""
NORM_RATIO = 1.15
"""The end of 1.05 to 1.15, where NormGuard's authors found images to have lost quality. On the playground DiffusionNFT stays below 1.04;
RAM with a multiplier of 20 learnt at 1.12, and with 50 passed this as its reward turned."""
KL = 0.4
"""mean (v - v_ref)^2, where a velocity's own mean square is 1 to 2 (its noise has 1). That RAM run rose up to .28 and fell from .47 on;
DiffusionNFT has .15 after 200 rollouts, RAM with a multiplier of 20 learnt at .26. Not measured on SD3.5."""
KL_GROWTH = 4.0
"""From one block to the next. Moving on in one direction is the fastest healthy way; kl is then the square of the time, and grows
2.7-fold from the second block to the third, less later."""
CLIPPED = 0.95
"""Share of the ratios that can be off (a rollout's first update has 1) and lie beyond the clip range."""
LOG_RATIO = 0.2
"""|log p_theta - log p_old|: weights exp of it are off by a fifth, PPO's usual clip, which these methods lack. Healthy runs: .03."""
SATURATED = 0.25
"""Share of values that became saturated since the start: a quarter of the picture. White or black grounds may be meant, so the share
itself says nothing. In a run that users report (OCR without a KL) dark pixels went from .45 to .93."""
BLANK = 0.1
"""Share of blank images: hardly a prompt asks for one."""
IDENTICAL = 0.5
"""Share of groups of equal images; .06 at most where the playground is learnt."""


class Seen(NamedTuple):
    """What a guard may look at."""

    recipe: Recipe
    metrics: Mapping[str, float]
    history: History

    def least(self, name: str, threshold: float) -> bool:
        """Whether this rollout's metric is there and not below the threshold."""
        return self.metrics.get(name, -float("inf")) >= threshold


class Rule(NamedTuple):
    """A guard fires after `patience` rollouts in a row for which `says` has something to say."""

    patience: int
    says: Callable[[Seen], str | None]


def nan(seen: Seen) -> str | None:
    """An update left out since its gradient is not finite; one left out since no image had an advantage has no norm of its own."""
    norms = [seen.metrics.get(name, 0.0) for name in ("grad_norm", "fake_grad_norm")]
    if not seen.metrics.get("skipped_updates") or all(map(isfinite, norms)):
        return None
    half = ', or use model.dtype = "bfloat16" instead of float16' if seen.recipe.model.dtype == "float16" else ""
    objective = seen.recipe.objective
    mine = f", or look in {own.name_of(objective)} for roots and quotients of 0" if own.is_users(objective) else ""
    return f"the loss or its gradient is not finite; the update was left out. Lower optimizer.lr{half}{mine}"


def missing(seen: Seen) -> str | None:
    lost = {name.removeprefix("missing/"): value for name, value in seen.metrics.items() if name.startswith("missing/") and value > 0}
    if not lost:
        return None
    reasons = "; ".join(f"{name} gave no score to {value:.0f} of this rollout's images" for name, value in lost.items())
    return (
        f"{reasons}. They were left out of their groups, which is no zero. metrics.jsonl goes on counting them as missing/<reward>; "
        f"many of them mean that {' and '.join(f'rewards.{name}' for name in lost)} or its server needs a look"
    )


def no_variance(seen: Seen) -> str | None:
    if not seen.least("groups/without_variance", NO_VARIANCE):
        return None
    return (
        f"for {RULES['no_variance'].patience} rollouts nearly every prompt gave images of equal reward, so there is nothing to compare. "
        "A reward of 0 everywhere is likely broken or too hard, one near its maximum is learnt; otherwise raise rollout.images_per_prompt"
    )


def no_contrast(seen: Seen) -> str | None:
    """For methods that compare v_theta with v_old."""
    contrast = own.contrast(seen.recipe.objective)
    if contrast is None or seen.metrics.get(contrast.metric) != 0:
        return None
    return (
        f"v_theta = v_old in every update of {RULES['no_contrast'].patience} rollouts, so {contrast.unused}. "
        'Set objective.old_policy = "linear" or optimizer.steps_per_rollout = 2'
    )


def norm_ratio(seen: Seen) -> str | None:
    if not seen.least("norm_ratio", NORM_RATIO):
        return None
    return (
        f"|v_theta| is {seen.metrics['norm_ratio']:.2f} times |v_ref|: velocities inflate, and images lose quality first where no reward "
        f"looks. Raise objective.norm_guard, or {_hold(seen.recipe)}"
    )


def kl(seen: Seen) -> str | None:
    """Not for methods whose kl is of a step's mean, in a unit that depends on the sampler."""
    if not seen.recipe.objective.kl_of_velocities or not seen.least("kl", KL):
        return None
    return (
        f"mean (v_theta - v_ref)^2 is {seen.metrics['kl']:.2g}, a good part of a velocity's own square: the policy has left the base, and "
        f"what the base knew goes with it. {_hold(seen.recipe).capitalize()}"
    )


def kl_growth(seen: Seen) -> str | None:
    growth = seen.history.growth("kl")
    if growth is None or growth < KL_GROWTH:
        return None
    return (
        f"kl grew {growth:.1f}-fold from the {BLOCK} rollouts before to these {BLOCK}, faster than moving in one direction would: the "
        f"policy runs away from the base. {_hold(seen.recipe).capitalize()}"
    )


def clipped(seen: Seen) -> str | None:
    """FlowGRPO's alone; with one update a rollout every ratio is 1 and nothing can be clipped."""
    updates = seen.recipe.optimizer.steps_per_rollout
    off = seen.metrics.get("clip_fraction")
    if off is None or updates == 1 or off < CLIPPED * (updates - 1) / updates:
        return None
    return (
        "after a rollout's first update nearly every likelihood ratio lies beyond objective.clip_range "
        f"(|ratio - 1| is {seen.metrics['ratio_off']:.1g} on average), so the later updates hardly teach. "
        "Lower optimizer.lr or optimizer.steps_per_rollout, or raise objective.clip_range"
    )


def log_ratio(seen: Seen) -> str | None:
    if not seen.least("log_ratio", LOG_RATIO):
        return None
    return (
        f"|log p_theta - log p_old| is {seen.metrics['log_ratio']:.2g} on average: updates outrun the policy that samples the images, and "
        "importance weights with them. Lower optimizer.lr, objective.scale or optimizer.steps_per_rollout"
    )


def reward_falling(seen: Seen) -> str | None:
    """The trained reward itself, block by block."""
    fall = falling(seen.history, TRAINED)
    if fall is None:
        return None
    return (
        f"the trained reward fell from {fall.best.value:.3g} to {fall.now.value:.3g}, means over {BLOCK} rollouts each: the run collapses. "
        f"Go back to an evaluation before it (report.html); lower optimizer.lr or {_hold(seen.recipe)}"
    )


def held_out(seen: Seen) -> str | None:
    """Rewards of weight 0, block by block."""
    watched = [name for name, reward in seen.recipe.reward_table().items() if not reward.weight]
    return held_out_falls({name: falling(seen.history, f"reward/{name}") for name in watched}, seen.history, seen.recipe)


def saturated(seen: Seen) -> str | None:
    start = seen.history.start("images/saturated")
    if start is None or not seen.least("images/saturated", start + SATURATED):
        return None
    return (
        f"{seen.metrics['images/saturated']:.0%} of all pixel values are at the end of their range, {start:.0%} were at the start: "
        f"images burn out or go dark. Look at the report's pictures; {_hold(seen.recipe)}, or add a reward for quality to rewards"
    )


def blank(seen: Seen) -> str | None:
    if not seen.least("images/blank", BLANK):
        return None
    return (
        f"{seen.metrics['images/blank']:.0%} of the images are blank, of one colour. Where it began so, the VAE fails "
        '(model.dtype = "float32" tells); otherwise the policy collapsed: go back to a checkpoint and lower optimizer.lr'
    )


def identical(seen: Seen) -> str | None:
    if not seen.least("groups/identical_images", IDENTICAL):
        return None
    return (
        f"{seen.metrics['groups/identical_images']:.0%} of the prompts give the same image over and over: diversity is gone, and with it "
        f"what could be compared. Go back to a checkpoint; {_hold(seen.recipe)} or lower optimizer.lr"
    )


RULES = {
    "nan": Rule(1, nan),
    "missing": Rule(1, missing),
    "no_variance": Rule(5, no_variance),
    "no_contrast": Rule(3, no_contrast),
    "norm_ratio": Rule(3, norm_ratio),
    "kl": Rule(3, kl),
    "kl_growth": Rule(1, kl_growth),
    "clipped": Rule(3, clipped),
    "log_ratio": Rule(3, log_ratio),
    "reward_falling": Rule(1, reward_falling),
    "held_out": Rule(1, held_out),
    "saturated": Rule(3, saturated),
    "blank": Rule(3, blank),
    "identical": Rule(3, identical),
}
"""Guards on a rollout's metrics. Those with patience 1 are rare events or look at whole blocks already."""


def remembered(recipe: Recipe, metrics: Mapping[str, float]) -> dict[str, float]:
    """What of a rollout's metrics the rules want to see again later.

    "trained" is the sum of the trained rewards' means by their weights, also where `combine` normalises each one, whose
    total is 0 on average. Its standard deviation is at most the sum of theirs.
    """
    table = recipe.reward_table()
    weights = {name: reward.weight for name, reward in table.items() if reward.weight}
    found = {
        TRAINED: sum(weight * metrics[f"reward/{name}"] for name, weight in weights.items()),
        f"{TRAINED}_std": sum(abs(weight) * metrics[f"reward/{name}_std"] for name, weight in weights.items()),
    }
    names = ["kl", "images/saturated", *(f"reward/{name}{end}" for name in table if name not in weights for end in ("", "_std"))]
    return found | {name: metrics[name] for name in names if name in metrics}


def falling(history: History, name: str) -> Fall | None:
    """Of a remembered reward, when a block ends."""
    now = history.reward(name) if history.block_ends else None
    return history.fall(name, now) if now else None


def held_out_falls(falls: Mapping[str, Fall | None], history: History, recipe: Recipe) -> str | None:
    """What is said of those that fell while the trained reward rose."""
    reasons = [
        f"{name} fell from {fall.best.value:.3g} to {fall.now.value:.3g}"
        for name, fall in falls.items()
        if fall and history.trained_rose(fall)
    ]
    if not reasons:
        return None
    return (
        f"{' and '.join(reasons)}, not trained on, while the trained reward rose: it is likely hacked. Look at the report's pictures; "
        f"{_hold(recipe)}, or give what fell a weight in rewards"
    )


def _hold(recipe: Recipe) -> str:
    """How the pull to the base, or to RTDMD's teacher, becomes stronger."""
    return recipe.objective.hold
