"""One run as a comparison sees it: its recipe, its scores, and what each of them had cost."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np

from flowtilt.config import Recipe, load_recipe
from flowtilt.errors import UserError
from flowtilt.io.run_folder import RunFolder
from flowtilt.report.compare.costs import COSTS, spent
from flowtilt.report.compare.spans import Line
from flowtilt.report.loading import Run, load
from flowtilt.report.markup import flat
from flowtilt.report.numbers import Array, number
from flowtilt.report.reading import Reader

APART = {"name", "seed", "run", "rollouts", "micro_batch", "checkpoint", "evaluate", "guards", "track", "log", "model", "rewards"}
"""Keys that make no other method; `model` and `evaluate` are the protocol's, `rewards` are put in one form."""


@dataclass(frozen=True)
class Entry:
    """A run with at least one evaluation."""

    run: Run
    recipe: Recipe
    steps: Array  # [N], rollouts at its evaluations
    scores: Array  # [N], all finite

    @property
    def seed(self) -> int:
        return self.recipe.seed

    @property
    def folder(self) -> Path:
        return self.run.folder

    @cached_property
    def costs(self) -> dict[str, Array]:
        """Cost by evaluation [N] on every axis that the run has logged."""
        found = {cost: spent(self.run, cost, self.steps) for cost in COSTS}
        return {cost: values for cost, values in found.items() if np.isfinite(values).all()}

    def line(self, cost: str) -> Line:
        """The score against a cost."""
        return self.costs[cost], self.scores

    @cached_property
    def protocol(self) -> dict[str, str]:
        """What scores depend on besides the weights, the seed apart, as key -> text."""
        recipe, e = self.recipe, self.recipe.evaluate
        judged = e.rewards[0] if e.rewards else next(iter(recipe.rewards))
        name = judged.partition("/")[0]
        settings = recipe.reward_table().get(name)
        judge = settings.model_dump(exclude={"weight"}) if settings else {"source": name, "compat": False, "options": {}}
        judge["source"] = self._content(judge["source"] or name)
        settings = e.model_dump(include={"images", "solver", "eta", "steps", "guidance"})
        evaluate = {"prompts": self._content(e.prompts or recipe.prompts), "rewards": judged, **settings}
        model = recipe.model.model_dump(mode="json") | {"path": self._content(recipe.model.path)}
        return dict(flat({"model": model, "evaluate": evaluate, "judge": judge}))

    @cached_property
    def _digests(self) -> dict[str, str]:
        """SHA-256 by path of the files that the run was made of."""
        files = Reader(self.folder).object(RunFolder.sources).get("files")
        known = [file for file in files if isinstance(file, dict)] if isinstance(files, list) else []
        return {str(file.get("path")): str(file["sha256"]) for file in known if file.get("sha256")}

    def _content(self, source: str) -> str:
        """What a path, or "file.py:name", stands for wherever it is: the digest of its content, or else its base name."""
        place, colon, name = source.rpartition(":") if ".py:" in source else (source, "", "")
        if "://" in source or not os.path.isabs(place):
            return source
        digest = self._digests.get(place)
        return (f"sha256:{digest[:12]}" if digest else os.path.basename(place.rstrip(os.sep))) + colon + name

    def shown(self, key: str) -> str:
        """A key of the protocol as a person reads it: of a file its name, too."""
        value = self.protocol.get(key)
        if not (value or "").startswith("sha256:"):
            return "none" if value in (None, "null") else str(value)
        digest = str(value).removeprefix("sha256:").partition(":")[0]
        paths = [path for path, sha256 in self._digests.items() if sha256.startswith(digest)]
        return f"{os.path.basename(paths[0])} ({value})"

    @property
    def switches(self) -> list[str]:
        """What was changed of its evaluations when it was resumed, a clause each."""
        found = []
        for key, name in (("column", "evaluate.rewards"), ("images", "evaluate.images")):
            values = list(dict.fromkeys(str(record[key]) for record in self.run.evaluations if key in record))
            found += [f"{name} is {', then '.join(values)} within {self.folder}"] if len(values) > 1 else []
        return found

    @cached_property
    def settings(self) -> dict[str, str]:
        """What makes the method, and the protocol, as key -> text."""
        tree = self.recipe.model_dump(mode="json", exclude=APART)
        rewards: dict[str, object] = {}
        for name, reward in self.recipe.reward_table().items():
            plain = reward.source == name and not reward.options and not reward.compat
            rewards[name] = reward.weight if plain else reward.model_dump() | {"source": self._content(reward.source or name)}
        tree["prompts"] = self._content(self.recipe.prompts)
        return dict(flat(tree | {"rewards": rewards})) | self.protocol


def load_entry(folder: Path) -> Entry:
    """The run in a folder, finished or not.

    Raises:
        UserError: the folder is no run, its recipe can't be read, or there is no score yet.
    """
    if not os.path.isfile(RunFolder(folder).recipe):
        raise UserError(f"run {folder}: not a run (no {RunFolder.recipe} there); give folders that flowtilt train has written")
    run = load(folder)
    scored = [record for record in run.evaluations if np.isfinite(number(record, "score"))]
    if not scored:
        raise UserError(f"run {folder}: no evaluation yet, so there is nothing to compare; leave it out, or go on training it")
    steps, scores = (np.array([number(record, key) for record in scored]) for key in ("rollout", "score"))
    return Entry(run, load_recipe(RunFolder(folder).recipe, stored=True), steps, scores)


def differing(settings: Sequence[dict[str, str]]) -> list[str]:
    """Keys that are not the same everywhere, one that is missing somewhere among them, in order of appearance."""
    keys = dict.fromkeys(key for one in settings for key in one)
    return [key for key in keys if len({one.get(key) for one in settings}) > 1]


def odd_protocols(entries: Sequence[Entry]) -> list[str]:
    """How the protocols of runs differ from that of the first, in a clause for each key; [] where they don't."""
    first, found = entries[0], []
    for key in differing([entry.protocol for entry in entries]):
        other = next(entry for entry in entries if entry.protocol.get(key) != first.protocol.get(key))
        found.append(f"{key} is {first.shown(key)} in {first.folder} and {other.shown(key)} in {other.folder}")
    return found + [clause for entry in entries for clause in entry.switches]


def plain(value: str | None) -> str:
    """A setting as a person writes it."""
    return "none" if value in (None, "null") else str(value)
