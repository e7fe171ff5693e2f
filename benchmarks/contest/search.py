"""How a method's setting is chosen: its whole grid on a part of the budget, then on twice that those that one evaluation can't tell apart.

No torch here.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from contest.jobs import final_job, search_jobs
from contest.results import made_by
from contest.running import Job
from contest.settings import DECIDED_BY, MOST, NEAR, Plan
from flowtilt.report.compare.entries import load_entry

Record = dict[str, Any]


class Search:
    """The search of one method in a folder of runs.

    Args:
        known: what `tried` gave before, maybe on another machine: it is not tried again.
    """

    def __init__(self, folder: Path, plan: Plan, method: str, known: Sequence[Record] = ()):
        self.plan, self.method = plan, method
        self.jobs = search_jobs(folder, plan, method)
        self.settings = [settings_of(overrides) for overrides in plan.grid(method)]
        self._known = {tuple(record["settings"].items()): record for record in known}

    def first_round(self) -> list[Job]:
        """Runs of settings without a score."""
        return [job for job, record in zip(self.jobs, self.tried(), strict=True) if record["score"] is None]

    def second_round(self) -> list[Job]:
        """Runs of the settings next to the best that have not gone on; none where one stands out."""
        tried = zip(self.jobs, self.tried(), strict=True)
        return [final_job(job, self.plan) for job, record in tried if record.get("final", 0) is None]

    def tried(self) -> list[Record]:
        """Every setting of the grid with its `score` after the first round; none where that is not done.

        Those of the second round have `final`, none while it is not done. Once nothing is missing one is `chosen`; among equals
        the earlier, whose learning rate is lower.
        """
        found = [self._first(*place) for place in zip(self.jobs, self.settings, strict=True)]
        scores = [record["score"] for record in found]
        if None in scores:
            return found
        close = finalists(scores)
        if len(close) > 1:
            for place in close:
                found[place] |= self._second(self.jobs[place], self.settings[place])
        decided = [found[place].get("final", found[place]["score"]) for place in close]
        if None not in decided:
            best = close[decided.index(max(decided))]
            for place, record in enumerate(found):
                record["chosen"] = place == best
        return found

    def chosen(self) -> tuple[str, ...] | None:
        """Overrides of the setting that was chosen; none while the search is not done."""
        for setting, record in zip(self.plan.grid(self.method), self.tried(), strict=True):
            if record.get("chosen"):
                return setting
        return None

    def _first(self, job: Job, settings: Record) -> Record:
        known = self._known.get(tuple(settings.items()), {})
        if known.get("score") is not None:
            return {key: known[key] for key in ("settings", "score", "network_evaluations", "machine", "commit")}
        if not job.finished():
            return {"settings": settings, "score": None}
        entry = load_entry(job.folder)
        costs, scores = entry.line("evaluations")
        at = int(np.flatnonzero(costs <= job.budget)[-1])
        return {"settings": settings, "score": float(scores[at]), "network_evaluations": int(costs[at]), **made_by(entry)}

    def _second(self, job: Job, settings: Record) -> Record:
        known = self._known.get(tuple(settings.items()), {})
        if known.get("final") is not None:
            return {key: value for key, value in known.items() if key.startswith("final")}
        if not final_job(job, self.plan).finished():
            return {"final": None}
        entry = load_entry(job.folder)
        told = {f"final_{key}": value for key, value in made_by(entry).items()}
        return {"final": float(entry.scores[-DECIDED_BY:].mean()), **told}


def finalists(scores: Sequence[float]) -> list[int]:
    """Places of the best score and of those next to it, rising."""
    ranked = sorted(range(len(scores)), key=lambda place: (-scores[place], place))[:MOST]
    return sorted(place for place in ranked if scores[ranked[0]] - scores[place] <= NEAR)


def settings_of(overrides: Sequence[str]) -> Record:
    """A setting of the grid as data."""
    return {key: _value(text) for key, _, text in (item.partition("=") for item in overrides)}


def _value(text: str) -> float | str:
    try:
        return float(text)
    except ValueError:
        return text
