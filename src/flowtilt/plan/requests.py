"""What rewards ask of servers that may cost money: requests, about how many tokens, and when a budget ends."""

from collections.abc import Sequence
from dataclasses import dataclass

from flowtilt.config import Recipe
from flowtilt.plan.passes import evaluations_in_all
from flowtilt.rewards.about import built_in
from flowtilt.rewards.named import Named

PATCH = 28
"""A picture is taken to be a token for so many pixels squared, as Qwen-VL's are."""
WORDS = 100
"""Tokens that a question is taken to have."""


@dataclass(frozen=True)
class Requests:
    """What one reward asks.

    Args:
        rollout: requests of a rollout.
        whole: of the whole run with its evaluations.
        tokens: of one request, assumed.
        cost: of the whole run; 0 where the recipe states no price.
        ends: what a budget does, in words; "" where it reaches or there is none.
    """

    rollout: float
    whole: float
    tokens: float
    cost: float
    ends: str


def requests_of(recipe: Recipe, trained: Sequence[Named], evaluated: Sequence[Named], resolution: int) -> dict[str, Requests]:
    """Those of each reward that asks such a server, by its name.

    Args:
        trained, evaluated: the rewards of rollouts and of evaluations.
    """
    r, times = recipe.rollout, evaluations_in_all(recipe)
    found: dict[str, Requests] = {}
    for one in {one.name: one for one in (*trained, *evaluated)}.values():
        about = built_in().get(one.source) if isinstance(one.source, str) else None
        if about is None or about.requests is None:
            continue
        images = recipe.rollout.images_per_prompt
        rollout = about.requests(one.options, r.prompts, images) if any(one.name == other.name for other in trained) else 0
        evaluation = about.requests(one.options, recipe.evaluate.images, 1) if any(one.name == other.name for other in evaluated) else 0
        whole = rollout * recipe.rollouts + evaluation * times
        side = min(resolution, int(one.options.get("side", 0)) or resolution)
        pictures = 2 if one.options.get("mode") == "pairs" else 1
        tokens = WORDS + pictures * (side / PATCH) ** 2
        prices = [float(one.options.get(key, 0)) for key in ("price_in", "price_out")]
        cost = whole * (tokens * prices[0] + prices[1]) / 1e6
        found[one.name] = Requests(rollout, whole, tokens, cost, _ends(one, recipe.rollouts, whole, tokens, cost))
    return found


def _ends(one: Named, steps: int, calls: float, tokens: float, cost: float) -> str:
    """The budget that is exceeded first, and about when."""
    needs = {"max_calls": calls, "max_tokens": calls * tokens, "max_cost": cost}
    shares = {key: float(one.options[key]) / need for key, need in needs.items() if one.options.get(key) and need}
    if not shares or min(shares.values()) >= 1:
        return ""
    key = min(shares, key=lambda name: shares[name])
    return f"{key} = {float(one.options[key]):,.12g} ends the run after about {int(shares[key] * steps):,} of {steps:,} rollouts"
