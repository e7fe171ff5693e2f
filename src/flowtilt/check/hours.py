"""From seconds that were measured on a few images to the hours of a run."""

from collections.abc import Mapping

from flowtilt.config import Recipe
from flowtilt.plan.passes import evaluations_in_all
from flowtilt.plan.text import duration


def hours_of(recipe: Recipe, tried: Recipe, seconds: Mapping[str, float]) -> float:
    """Hours of a run: rollouts and evaluations.

    Args:
        tried: the recipe of the step that was measured.
        seconds: of that step by phase ("encode", "sample", "decode", "reward", "train", …); "evaluate" and "judge" per image;
            "visit" of the reward models, paid like "encode" once for a rollout and for an evaluation, however many images they have.
    """
    images = recipe.rollout.images() / tried.rollout.images()
    trained = recipe.rollout.trained() / tried.rollout.trained()
    once, visit = seconds.get("encode", 0.0), min(seconds["visit"], seconds.get("reward", 0.0))
    phases = {name: value for name, value in seconds.items() if name not in ("encode", "evaluate", "judge", "visit")}
    phases["reward"] = phases.get("reward", 0.0) - visit
    rollout = once + visit + sum(value * (trained if name == "train" else images) for name, value in phases.items())
    evaluation = once + seconds["visit"] + recipe.evaluate.images * (seconds["evaluate"] + seconds["judge"])
    return (recipe.rollouts * rollout + evaluations_in_all(recipe) * evaluation) / 3600


def visit_apart(few: float, many: float, images: int, more: int) -> tuple[float, float]:
    """Seconds of an image, and of a visit that is paid once, from the seconds of two numbers of images; neither is below 0."""
    each = max(many - few, 0.0) / (more - images)
    return each, max(few - each * images, 0.0)


def said(hours: float, planned: float | None, price: float | None) -> str:
    """The hours, what `flowtilt plan` says, and the cost, in a line.

    Args:
        planned: hours by the plan; none where there is none for this machine.
        price: of an hour.
    """
    plan = f"; `flowtilt plan` says {duration(planned)}" if planned is not None else ""
    cost = f"; {price * hours:,.2f} at {price:g} per hour" if price is not None else ""
    return f"about {duration(hours)} for the whole run, by a few images{plan}{cost}"
