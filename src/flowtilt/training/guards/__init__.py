"""Alarms that act: each says once what happened, what it means and what to change."""

from collections.abc import Mapping
from typing import Any

from flowtilt.config import Recipe
from flowtilt.methods import own
from flowtilt.training.guards.history import History
from flowtilt.training.guards.rules import RULES, Seen, held_out_falls, remembered

FIRED = -1


class Guards:
    """Watches one run's metrics; `state` is all it remembers and goes into checkpoints.

    Args:
        recipe: says which rewards are trained, and by which method.
        state: of an earlier `Guards`; none starts anew.
    """

    def __init__(self, recipe: Recipe, state: Mapping[str, Any] | None = None):
        self._recipe = recipe
        found = state or {}
        self._in_a_row: dict[str, int] = dict(found.get("in_a_row", {}))
        self._history = History(found.get("history"))

    @property
    def state(self) -> dict[str, Any]:
        """As JSON."""
        return {"in_a_row": self._in_a_row, "history": self._history.state}

    def check(self, metrics: Mapping[str, float]) -> dict[str, str]:
        """Alarms that fire for the first time in this rollout: name -> message."""
        self._history.add(remembered(self._recipe, metrics))
        seen = Seen(self._recipe, metrics, self._history)
        said = {name: (rule.patience, rule.says(seen)) for name, rule in RULES.items()}
        said |= {f"objective/{name}": (guard.patience, guard.check(metrics)) for name, guard in own.guards(self._recipe.objective).items()}
        return {name: message for name, (patience, message) in said.items() if self._fires(name, patience, message) and message}

    def check_evaluation(self, means: Mapping[str, float], stds: Mapping[str, float], images: int) -> dict[str, str]:
        """As `check`, for an evaluation's rewards that are not trained on: their mean and standard deviation over `images` images."""
        trained = {name for name, reward in self._recipe.reward_table().items() if reward.weight}
        # a detail counts where the recipe asks for it: others may be better when lower
        watched = [name for name in means if name not in trained and ("/" not in name or name in self._recipe.evaluate.rewards)]
        falls = {}
        for name in watched:
            now = self._history.judged(means[name], stds[name], images)
            falls[name] = self._history.fall(f"evaluation/{name}", now)
            self._history.better(f"evaluation/{name}", now)
        message = held_out_falls(falls, self._history, self._recipe)
        return {"held_out": message} if message and self._fires("held_out", 1, message) else {}

    def _fires(self, name: str, patience: int, message: str | None) -> bool:
        """Whether trouble has now lasted for `patience` rollouts in a row, for the first time in this run."""
        in_a_row = self._in_a_row.get(name, 0)
        if in_a_row == FIRED:
            return False
        in_a_row = in_a_row + 1 if message else 0
        self._in_a_row[name] = FIRED if in_a_row == patience else in_a_row
        return in_a_row == patience
