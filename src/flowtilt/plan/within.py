"""A geometry that is done within a given time, and what it gives up.

Every geometry of a grid that the machine can hold is measured by how far it is from the recipe: the sum over its quantities of a weight
times the logarithm of the factor by which each shrinks. The nearest one that fits the time is proposed. The weights say what hurts most:
images of a prompt, since rewards are compared among them and small groups are known to fail, then the resolution, then rollouts.
"""

import math
import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import product
from typing import Any

from flowtilt.build import judges_of, rewards_of
from flowtilt.config import Recipe
from flowtilt.errors import UserError
from flowtilt.methods.schedule import stretched
from flowtilt.plan.judges import judging
from flowtilt.plan.machine import GPUS, Machine
from flowtilt.plan.memory import GIB, Fitted, Memory
from flowtilt.plan.network import costs_of
from flowtilt.plan.passes import evaluations_in_all
from flowtilt.plan.plan import Plan, make_plan, work_of

LEAST_GROUP = 12
"""Images of a prompt below which nothing is proposed: users report that smaller groups fall (flow_grpo, issues 172 and 182)."""
LEAST_PROMPTS = 8
LEAST_ROLLOUTS = 150
"""Rollouts below which nothing is proposed: the fewest with which a published run of DiffusionNFT came to its score, on OCR."""
WEIGHTS = {
    "model.resolution": 6.0,
    "rollout.images_per_prompt": 2.0,
    "rollouts": 1.5,
    "rollout.prompts": 1.0,
    "rollout.steps": 1.0,
    "objective.times_per_image": 0.7,
}
"""How much it counts that a quantity is halved."""
EVALUATIONS = 10
"""A run is evaluated so often at most, beside before it begins."""
SHORT = 20
"""Rollouts of the short runs by which the time of a long one is measured."""
Value = int | tuple[tuple[float, float], ...]
"""Of a key: a number, or a schedule's points."""


@dataclass(frozen=True)
class Proposal:
    """What becomes of a recipe within a time.

    Args:
        changed: its keys and their new values; empty where the recipe fits as it is.
        was: the same keys as the recipe has them.
        plan: of the recipe with the changes.
    """

    recipe: Recipe
    hours: float
    changed: Mapping[str, Value]
    was: Mapping[str, Value]
    plan: Plan

    def as_json(self) -> dict[str, Any]:
        """Plain values."""
        return {"within_hours": self.hours, "changed": dict(self.changed), "was": dict(self.was), **self.plan.as_json()}

    def text(self, base: str, overrides: Sequence[str] = ()) -> str:
        """What was given up, the recipe as a file that is based on `base`, and the command that trains it.

        Args:
            overrides: "key=value" with which `base` became the recipe.
        """
        m, name = self.plan.machine, f"{self.recipe.name}-{self.hours:g}h"
        head = f"{self.recipe.name} within {self.hours:g} h on {m.gpus} x {m.gpu}: about {self.plan.hours:.3g} h by plan"
        if not self.changed:
            return f"{head}; it fits as it is"
        given = [f"{key} {self.changed[key]} instead of {self.was[key]}" for key in self.changed if key in WEIGHTS]
        images = self.recipe.rollouts * self.recipe.rollout.images()
        left = self.changed_recipe.rollouts * self.changed_recipe.rollout.images()
        lines = [f"# {head}. Given up:", *(f"# - {one}" for one in given), f"# - {left:,} images in all instead of {images:,}"]
        kept = [shlex.quote(one) for one in overrides if one.partition("=")[0].strip() not in self.changed]
        lines += [f"# Save this as {name}.toml, then: {' '.join(['flowtilt train', f'{name}.toml', *kept])}"]
        lines += [f'base = "{base}"', f'name = "{name}"']
        lines += [f"{key} = {_toml(value)}" for key, value in self.changed.items() if "." not in key]
        for table in dict.fromkeys(key.partition(".")[0] for key in self.changed if "." in key):
            lines += ["", f"[{table}]"]
            lines += [f"{key.partition('.')[2]} = {_toml(value)}" for key, value in self.changed.items() if key.startswith(f"{table}.")]
        return "\n".join(lines)

    @property
    def changed_recipe(self) -> Recipe:
        """The recipe with the changes."""
        return self.plan.recipe


def proposal(recipe: Recipe, machine: Machine, hours: float) -> Proposal:
    """The geometry nearest to a recipe's that is done on a machine within a time.

    Raises:
        UserError: none that is sensible fits, with the cards that one would fit on; or the time is none.
    """
    if not 0 < hours < math.inf:
        raise UserError(f"plan: --hours must be above 0, not {hours:g}")
    found = _nearest(recipe, machine, hours)
    if found is not None:
        return found
    sizes = _sizes(_quantities(recipe)["model.resolution"], recipe)
    if not any(_Fitted.of(_with(recipe, {"model.resolution": size}), machine) for size in sizes):
        peak = make_plan(recipe, machine).peak
        raise UserError(
            f"plan: {recipe.name} needs {peak.total / GIB:.1f} GiB, most in {peak.name}, and no smaller resolution fits the "
            f"{machine.gib:g} GiB of this {machine.gpu}; model.quantize or a larger card may help"
        )
    others = [replace(machine, gpu=gpu, memory=None, inside=None) for gpu in GPUS if gpu != machine.gpu]
    others += [replace(machine, gpu=machine.gpu if machine.gpu != "4090" else "h100", gpus=8, nodes=1, memory=None, inside=None)]
    fit = [f"{other.gpus} x {other.gpu}" for other in others if _nearest(recipe, other, hours) is not None]
    where = f"it would on {', '.join(fit)}" if fit else "nor does one on any other card here, or on 8 of them"
    raise UserError(
        f"plan: no geometry of {recipe.name} with at least {LEAST_GROUP} images per prompt, {LEAST_PROMPTS} prompts and {LEAST_ROLLOUTS} "
        f"rollouts fits {hours:g} h on {machine.gpus} x {machine.gpu}; {where}"
    )


def _nearest(recipe: Recipe, machine: Machine, hours: float) -> Proposal | None:
    was = _quantities(recipe)
    plain = make_plan(recipe, machine)
    if plain.fits and plain.hours <= hours:
        return Proposal(recipe, hours, {}, {}, plain)
    best: tuple[float, dict[str, int]] | None = None
    for resolution in _sizes(was["model.resolution"], recipe):
        fitted = _Fitted.of(_with(recipe, {"model.resolution": resolution}), machine)
        if fitted is None:
            continue
        for changed in _grid({**was, "model.resolution": resolution}):
            try:
                rollouts = fitted.rollouts(_with(recipe, changed), hours)
            except (UserError, ValueError):
                continue  # the method does not bear it
            if rollouts < min(LEAST_ROLLOUTS, recipe.rollouts):
                continue
            found = {**changed, "rollouts": rollouts}
            lost = sum(weight * math.log2(was[key] / found[key]) for key, weight in WEIGHTS.items() if key in found)
            if best is None or lost < best[0]:
                best = lost, found
    if best is None:
        return None
    rollouts = best[1]["rollouts"]
    changes: dict[str, Value] = {key: value for key, value in best[1].items() if value != was[key]}
    if rollouts != recipe.rollouts:
        changes |= _schedules(recipe, rollouts)
    if (every := _every(recipe, rollouts)) != recipe.evaluate.every:
        changes["evaluate.every"] = every
    return Proposal(recipe, hours, changes, {key: _value(recipe, key) for key in changes}, make_plan(_with(recipe, changes), machine))


def _every(recipe: Recipe, rollouts: int) -> int:
    """Rollouts between the evaluations of a shorter run; 0 stays."""
    return recipe.evaluate.every and max(recipe.evaluate.every, -(-rollouts // EVALUATIONS))


def _schedules(recipe: Recipe, rollouts: int) -> dict[str, Value]:
    """Schedules that end at the same share of so many rollouts as they do of the recipe's."""
    tables = {"objective": recipe.objective, "optimizer": recipe.optimizer}
    share = rollouts / recipe.rollouts
    return {f"{table}.{key}": points for table, values in tables.items() for key, points in stretched(values, share).items()}


@dataclass(frozen=True)
class _Fitted:
    """A recipe's costs on a machine, which geometries of the same resolution have in common."""

    needed: Memory
    found: Fitted

    @staticmethod
    def of(recipe: Recipe, machine: Machine) -> "_Fitted | None":
        """None where it does not fit into the memory."""
        costs = costs_of(recipe.model, recipe.lora.rank, recipe.lora.alpha, recipe.train == "full")
        train, judge = (judging(rewards, costs.resolution) for rewards in (rewards_of(recipe), judges_of(recipe)))
        needed = Memory(recipe, costs, train, judge, machine)
        found = needed.fit()
        return _Fitted(needed, found) if found.fits else None

    def rollouts(self, recipe: Recipe, hours: float) -> int:
        """How many of a recipe's rollouts are done within a time, no more than it has, with the evaluations of so many."""
        utilisation = self.needed.machine.reached(recipe.model.compile)

        def work(steps: int) -> tuple[float, float]:
            short = _with(recipe, {"rollouts": steps, **_schedules(recipe, steps)})
            found = work_of(replace(self.needed, recipe=short), self.found, utilisation)
            evaluation = found.pop("evaluate").hours / evaluations_in_all(short)
            return sum(effort.hours for effort in found.values()), evaluation

        (long, evaluation), (short, _) = work(2 * SHORT), work(SHORT)
        each, number = (long - short) / SHORT, recipe.rollouts
        while number > 0:
            counted = _with(recipe, {"rollouts": number, "evaluate.every": _every(recipe, number)})
            needed = number * each + evaluations_in_all(counted) * evaluation
            if needed <= hours:
                break
            number -= max(1, int((needed - hours) / (each + evaluation)))
        return number


def _quantities(recipe: Recipe) -> dict[str, int]:
    found = {key: _value(recipe, key) for key in WEIGHTS if key != "model.resolution" and _has(recipe, key)}
    costs = costs_of(recipe.model, recipe.lora.rank, recipe.lora.alpha, recipe.train == "full")
    return {**found, "model.resolution": costs.resolution}


def _grid(was: Mapping[str, int]) -> Iterator[dict[str, int]]:
    """Geometries no larger than `was`, each key at its own steps."""
    choices = {
        "rollout.images_per_prompt": (24, 20, 16, LEAST_GROUP),
        "rollout.prompts": (48, 40, 32, 24, 20, 16, 12, LEAST_PROMPTS),
        "rollout.steps": (20, 15, 10, 8, 6),
        "objective.times_per_image": (9, 7, 5, 4, 3, 2),
    }
    keys = [key for key in choices if key in was]
    for values in product(*([was[key], *(value for value in choices[key] if value < was[key])] for key in keys)):
        found = {**was, **dict(zip(keys, values, strict=True))}
        if found.get("objective.times_per_image", 1) <= found["rollout.steps"]:
            yield found


def _sizes(own: int, recipe: Recipe) -> list[int]:
    return [own, *(size for size in (768, 512, 384) if size < own)]


def _has(recipe: Recipe, key: str) -> bool:
    table, _, name = key.rpartition(".")
    return hasattr(getattr(recipe, table) if table else recipe, name)


def _toml(value: Value) -> str:
    """A value as TOML has it."""
    return f"[{', '.join(f'[{x:g}, {y:g}]' for x, y in value)}]" if isinstance(value, tuple) else str(value)


def _value(recipe: Recipe, key: str) -> Any:
    table, _, name = key.rpartition(".")
    return getattr(getattr(recipe, table) if table else recipe, name)


def _with(recipe: Recipe, changed: Mapping[str, Value]) -> Recipe:
    """The recipe with other values."""
    tables: dict[str, dict[str, Value]] = {}
    for key, value in changed.items():
        table, _, name = key.rpartition(".")
        tables.setdefault(table, {})[name] = value
    update: dict[str, Any] = dict(tables.pop("", {}))
    for table, values in tables.items():
        update[table] = getattr(recipe, table).model_copy(update=values)
    return recipe.model_copy(update=update)
