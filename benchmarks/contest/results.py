"""The figures: each run's entry, the search with all that was tried, and the file that holds them. No torch here."""

import json
import math
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from contest.jobs import search_jobs
from contest.running import Job
from contest.settings import COLLAPSE, METHODS, SEARCH_SEED, TARGET, Plan
from flowtilt.report.compare.entries import load_entry
from flowtilt.report.compare.spans import crossing

Record = dict[str, Any]


def entry_of(job: Job, **told: Any) -> Record:
    """What a finished run came to; what was never reached or is not known is none.

    final_score and best_score are those of the run's own evaluations, held_out and trained those of `measures.measure`.
    """
    run = load_entry(job.folder)
    costs, scores = run.line("evaluations")
    reached, last, best = crossing(costs, scores, TARGET), float(scores[-1]), float(scores.max())
    environment = run.run.environment
    return {
        **told,
        "seed": run.seed,
        "command": job.command(),
        "machine": _machine(environment),
        "commit": environment.get("commit"),
        "network_evaluations": job.spent(),
        "seconds": round(run.run.seconds, 1),
        f"evaluations_to_{TARGET:g}": round(reached) if math.isfinite(reached) else None,
        "final_score": last,
        "best_score": best,
        "fell": best - last,
        "collapsed": best - last > COLLAPSE,
        **_measures(job.folder / "measures.json"),
        "guards": sorted({str(guard.get("guard")) for guard in run.run.guards}),
        "curve_evaluations_score": [[int(cost), round(float(score), 4)] for cost, score in zip(costs, scores, strict=True)],
    }


def _machine(environment: Record) -> str:
    packages = environment.get("packages", {})
    processor, threads = environment.get("processor"), environment.get("threads")
    return f"{processor}, {threads} thread, torch {packages.get('torch')}, Python {environment.get('python')}"


def _measures(path: Path) -> Record:
    return json.loads(path.read_text()) if path.is_file() else {}


def search_of(folder: Path, plan: Plan, method: str) -> list[Record]:
    """Every setting of a method's grid with its last score on the validation split; none where a run is not done.

    Once all are done, the best is `chosen`; among equals the earlier, whose learning rate is lower.
    """
    found = []
    for job in search_jobs(folder, plan, method):
        score = float(load_entry(job.folder).scores[-1]) if job.finished() else None
        found.append({"settings": settings_of(job.overrides, method), "score": score, "network_evaluations": job.spent()})
    scores = [record["score"] for record in found]
    if None not in scores:
        for place, record in enumerate(found):
            record["chosen"] = place == scores.index(max(scores))
    return found


def settings_of(overrides: Sequence[str], method: str) -> Record:
    """Learning rate and main setting of a run."""
    given = dict(item.split("=", 1) for item in overrides)
    return {key: float(given[key]) for key in ("optimizer.lr", f"objective.{METHODS[method].knob}")}


def declared(plan: Plan) -> Record:
    """The plan as data, which a folder of runs and the file of results begin with."""
    return {
        **{key: value for key, value in asdict(plan).items() if key not in ("seeds", "methods")},
        "search_budget": plan.search_budget,
        "search_seed": SEARCH_SEED,
    }
