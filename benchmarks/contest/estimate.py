"""How long it takes. No torch here."""

from contest.running import Job
from contest.settings import ABLATIONS, POINTS, Plan

SECONDS = {"grpo": 0.80, "epg": 0.93, "pepg": 0.92}
"""Of a core, for 1,000 network evaluations of training: four rollouts each, one thread, on a Xeon that was busy with other work."""
OTHER = 0.91
"""Of every other method: measured for nft, awm and ram."""
EVALUATION = 6.0
"""Seconds of one evaluation of 240 images."""
START = 4.0
"""Seconds until a process trains."""
MEASURES = 25.0
"""Seconds of what is measured after a run."""
CLOSE = 2
"""Settings of a method that come into the search's second round, as a guess."""


def expected(job: Job) -> float:
    """Seconds that a job still takes."""
    left = max(job.budget - job.spent(), 0)
    return START + _seconds(job.load().objective.type, left, POINTS * left // Plan.budget) + MEASURES * bool(job.amount)


def _seconds(method: str, budget: int, points: int) -> float:
    return SECONDS.get(method, OTHER) * budget / 1000 + EVALUATION * points


def hours(plan: Plan, stages: list[str], workers: int) -> str:
    """The estimate as a line."""
    seconds = dict.fromkeys(stages, 0.0)
    for method in plan.methods:
        whole = START + _seconds(method, plan.budget, POINTS)
        tried = START + _seconds(method, plan.search_budget, POINTS * plan.search_budget // plan.budget)
        of_stage = {"search": (len(plan.grid(method)) + CLOSE) * tried, "run": len(plan.seeds) * (whole + MEASURES)}
        if method == "nft":
            of_stage["ablate"] = len(ABLATIONS) * of_stage["run"]
        for stage in stages:
            seconds[stage] += of_stage.get(stage, 0.0)
    told = ", ".join(f"{stage} {value / workers / 3600:.1f} h" for stage, value in seconds.items() if value)
    return f"about {sum(seconds.values()) / workers / 3600:.1f} h with {workers} processes on as many idle cores ({told})"
