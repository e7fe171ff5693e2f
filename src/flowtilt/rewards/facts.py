"""What a reward that can be called says of itself: a built-in one by its description, a user's own by attributes.

The attributes of a function, a class or an instance, all optional: `score_range = (0, 1)`, `detail_ranges = {"contrast": (0, 1)}`,
`reads_prompt = False`, `off_device = True`, `compares = True`, `plan_note = "0.1 s per image"`, `differentiable` (see `rewards.gradient`).
"""

import inspect
import math
from collections.abc import Mapping
from dataclasses import fields, replace
from functools import cache, partial
from typing import Any

from flowtilt.errors import UserError
from flowtilt.io.user_errors import HINT, describe_error, is_fault
from flowtilt.rewards.about import Bounds, BuiltIn, Facts, built_in


def built_in_name(reward: Any) -> str | None:
    """What a built-in reward is called in recipes, whatever its name in this one; none for a server's or a user's."""
    found = _by_source().get(_source(kind_of(reward)))
    return found.name if found else None


def kind_of(reward: Any) -> Any:
    """The function or class of a reward, options and instance removed."""
    inner = reward.func if isinstance(reward, partial) else reward
    return inner if inspect.isfunction(inner) or inspect.isclass(inner) else type(inner)


def facts_of(name: str, reward: Any) -> Facts:
    """What a reward says of itself; of a class that extends a built-in one what it does not say is the built-in one's.

    Args:
        name: for errors.
        reward: a function, class or instance, or what `load_reward` returned.

    Raises:
        UserError: an attribute is not what it should be.
    """
    plain = reward.func if isinstance(reward, partial) else reward
    kind = kind_of(reward)
    bases = inspect.getmro(kind) if inspect.isclass(kind) else (kind,)
    base = next((found for one in bases if (found := _by_source().get(_source(one)))), Facts())
    if isinstance(base, BuiltIn) and _source(kind) == base.source:
        own = getattr(plain, "facts", None)  # what depends on its options
        return own if isinstance(own, Facts) else base
    known = {field.name: getattr(base, field.name) for field in fields(Facts)}
    if not isinstance(known["plan_note"], str):
        known["plan_note"] = ""  # it is for the built-in one's options
    own = {key: value for key in known if (value := _attribute(name, plain, key)) is not None}
    if "differentiable" in own:
        own["differentiable"] = own["differentiable"] is True or callable(own["differentiable"])
    facts = Facts(**{**known, **own})
    _check(name, facts)
    ranges = {detail: _floats(bounds) for detail, bounds in facts.detail_ranges.items()}
    return replace(facts, score_range=facts.score_range and _floats(facts.score_range), detail_ranges=ranges)


def ranges_of(rewards: Mapping[str, Any]) -> dict[str, Bounds]:
    """Bounds by column of the rewards and details that have any."""
    return {column: bounds for name, reward in rewards.items() for column, bounds in facts_of(name, reward).ranges(name).items()}


@cache
def _by_source() -> dict[str, BuiltIn]:
    return {one.source: one for one in built_in().values()}


def _source(kind: Any) -> str:
    return f"{getattr(kind, '__module__', '')}:{getattr(kind, '__qualname__', '')}"


def _attribute(name: str, reward: Any, key: str) -> Any:
    try:
        return getattr(reward, key, None)
    except BaseException as error:
        if not is_fault(error):
            raise
        raise UserError(f"reward {name}: its attribute {key} failed: {describe_error(error)} ({HINT})") from error


def _check(name: str, facts: Facts) -> None:
    if facts.score_range is not None and not _is_range(facts.score_range):
        raise UserError(f"reward {name}: score_range is {facts.score_range!r}, want the lowest and the highest score, as in (0, 1)")
    if not isinstance(facts.detail_ranges, Mapping) or not all(_is_range(one) for one in facts.detail_ranges.values()):
        raise UserError(f'reward {name}: detail_ranges is {facts.detail_ranges!r}, want a range by detail, as in {{"contrast": (0, 1)}}')
    for key in ("reads_prompt", "off_device", "compares"):
        if not isinstance(value := getattr(facts, key), bool | None):
            raise UserError(f"reward {name}: {key} is {value!r}, want True or False")
    if not isinstance(facts.plan_note, str):
        raise UserError(f"reward {name}: plan_note is {facts.plan_note!r}, want the text that `flowtilt plan` shows")


def _floats(bounds: Bounds) -> Bounds:
    low, high = bounds
    return float(low), float(high)


def _is_range(value: Any) -> bool:
    try:
        low, high = value
        return math.isfinite(low) and math.isfinite(high) and low < high
    except (TypeError, ValueError):
        return False
