"""The figures: each run's entry, and what tells which plan they are of. No torch here."""

import json
import math
import re
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from contest.running import Job
from contest.settings import COLLAPSE, SEARCH_SEED, TARGET, Plan
from flowtilt.report.compare.entries import Entry, load_entry
from flowtilt.report.compare.spans import crossing

Record = dict[str, Any]


def entry_of(job: Job, **told: Any) -> Record:
    """What a finished run came to; what was never reached or is not known is none.

    final_score and best_score are those of the run's own evaluations, held_out and trained those of `measures.measure`.
    """
    run = load_entry(job.folder)
    costs, scores = run.line("evaluations")
    reached, last, best = crossing(costs, scores, TARGET), float(scores[-1]), float(scores.max())
    return {
        **told,
        "seed": run.seed,
        "command": job.command(),
        **made_by(run),
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


def kept(job: Job, known: Iterable[Record]) -> Record | None:
    """The entry of a run that was made before, maybe on another machine."""
    # results of version 0.1 say steps for rollouts
    return next((entry for entry in known if re.sub(r" (rollouts|steps)=\d+$", "", entry["command"]) == job.line()), None)


def made_by(run: Entry) -> Record:
    """The machine of a run, and the commit of the code."""
    environment = run.run.environment
    processor, threads = environment.get("processor"), environment.get("threads")
    packages = environment.get("packages", {})
    machine = f"{processor}, {threads} thread, torch {packages.get('torch')}, Python {environment.get('python')}"
    return {"machine": machine, "commit": environment.get("commit")}


def _measures(path: Path) -> Record:
    return json.loads(path.read_text()) if path.is_file() else {}


def declared(plan: Plan) -> Record:
    """The plan as data, which a folder of runs and the file of results begin with."""
    return {
        **{key: value for key, value in json.loads(json.dumps(asdict(plan))).items() if key not in ("seeds", "methods")},
        "search_budget": plan.search_budget,
        "final_budget": plan.final_budget,
        "search_seed": SEARCH_SEED,
    }
