"""Which runs there are: of the search, of the comparison, of the ablations. No torch here."""

import dataclasses
from pathlib import Path

from contest.running import Job, more_rollouts
from contest.settings import ABLATIONS, METHODS, POINTS, SEARCH_SEED, Amount, Plan
from flowtilt.config import load_recipe
from flowtilt.errors import UserError

VALIDATION = ("prompts=playground-search", "evaluate.prompts=playground-search", "evaluate.samples=0")


def search_jobs(folder: Path, plan: Plan, method: str) -> list[Job]:
    """One for each setting of the method's grid, with its training and validation prompts."""
    jobs = []
    for setting in plan.grid(method):
        name = ",".join(item.partition(".")[2] for item in setting)
        overrides = (*setting, *VALIDATION, f"seed={SEARCH_SEED}")
        jobs.append(_job(folder / "search" / f"{method},{name}", METHODS[method].recipe, overrides, plan, plan.search_budget))
    return jobs


def final_job(job: Job, plan: Plan) -> Job:
    """A run of the search, for its second round: it goes on."""
    return dataclasses.replace(job, budget=plan.final_budget)


def main_jobs(folder: Path, plan: Plan, method: str, setting: tuple[str, ...]) -> list[Job]:
    """One for each seed, on the test's prompts."""
    return [
        _job(folder / "runs" / f"{method}-{seed}", METHODS[method].recipe, (*setting, f"seed={seed}"), plan, plan.budget, plan.amount)
        for seed in plan.seeds
    ]


def ablation_jobs(folder: Path, plan: Plan, variant: str, setting: tuple[str, ...]) -> list[Job]:
    """One for each seed: DiffusionNFT with this setting and one change."""
    changed = ABLATIONS[variant].overrides
    if "objective.type=epg" in changed:  # which has no beta
        setting = tuple(item for item in setting if not item.startswith("objective."))
    return [
        _job(folder / "ablations" / f"{variant}-{seed}", "playground", (*setting, *changed, f"seed={seed}"), plan, plan.budget, plan.amount)
        for seed in plan.seeds
    ]


def _job(folder: Path, recipe: str, overrides: tuple[str, ...], plan: Plan, budget: int, amount: Amount | None = None) -> Job:
    overrides = (*plan.overrides, *overrides)
    read = load_recipe(recipe, overrides)
    if not more_rollouts(read, 0, budget):
        raise UserError(f"budget {plan.budget}: {budget} network evaluations are less than one rollout of {read.name}; choose a larger one")
    rollouts = more_rollouts(read, 0, plan.budget)
    return Job(folder, recipe, (*overrides, f"evaluate.every={max(1, rollouts // POINTS)}"), budget, amount)
