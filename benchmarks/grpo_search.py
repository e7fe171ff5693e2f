"""FlowGRPO as an expert might set it: kinds of step, noise, windows, updates, clips and groups.

    python benchmarks/grpo_search.py --folder runs/grpo_search                one seed of each setting, on playground-search
    python benchmarks/grpo_search.py --folder runs/grpo_search --test         then the best one on the test prompts
    python benchmarks/grpo_search.py --folder runs/grpo_search --report       no run, only what is finished

`head_to_head.py` searches two keys of every method. This asks whether another FlowGRPO would have changed the comparison. Settings were
declared below before they were run: sixteen, then eight around the best of these. Validation prompts, seed, budgets and the rule by which
one is chosen are those of that search, as are seeds and budget of the test. Finished runs are not made again. results/grpo_search.json has
what is finished.
"""

import argparse
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from contest.estimate import expected
from contest.jobs import VALIDATION, final_job, main_jobs
from contest.machine import machine
from contest.results import entry_of
from contest.running import Job, more_rollouts, run_all
from contest.search import finalists
from contest.settings import DECIDED_BY, METHODS, SEARCH_SEED, Plan

from flowtilt.config import load_recipe
from flowtilt.io.files import read_lines, write_json
from flowtilt.io.quiet import quieten
from flowtilt.report.compare.entries import load_entry

METHOD = "grpo"
RECIPE = METHODS[METHOD].recipe
RESULTS = Path(__file__).parent / "results" / "grpo_search.json"
EVALUATIONS = 6
"""Of a run, besides the one before."""
WINDOW = ("objective.window=random", "objective.window_size=2", "objective.span=[0,4]")
CPS = ("objective.sde=cps", "objective.eta=0.8")


@dataclass(frozen=True)
class Setting:
    label: str
    overrides: tuple[str, ...]


SETTINGS = (
    Setting("as head to head chose it: Flow-SDE, eta 1, all steps, 2 updates, lr 3e-3, clip 1e-3", ()),
    Setting("eta 0.7", ("objective.eta=0.7",)),
    Setting("clip 3e-3", ("objective.clip_range=3e-3",)),
    Setting("1 update", ("optimizer.steps_per_rollout=1",)),
    Setting("4 updates, lr 1.5e-3", ("optimizer.steps_per_rollout=4", "optimizer.lr=1.5e-3")),
    Setting("groups of 24", ("rollout.prompts=6", "rollout.images_per_prompt=24")),
    Setting("one standard deviation for all groups", ("advantage=global",)),
    Setting("kl 0.04", ("objective.kl=0.04",)),
    Setting("a window of 2 in the first 4 steps", WINDOW),
    Setting("Dance, eta 0.3", ("objective.sde=dance", "objective.eta=0.3")),
    Setting("CPS, eta 0.8", CPS),
    Setting("CPS, eta 0.8, that window", (*CPS, *WINDOW)),
    Setting("CPS, eta 0.8, that window, lr 1.5e-3", (*CPS, *WINDOW, "optimizer.lr=1.5e-3")),
    Setting("CPS, eta 0.8, that window, kl 0.04", (*CPS, *WINDOW, "objective.kl=0.04")),
    Setting("CPS, eta 0.8, that window, 1 update", (*CPS, *WINDOW, "optimizer.steps_per_rollout=1")),
    Setting("Flow-DPPO's trust 1e-5", ("objective.trust=1e-5",)),
    # around the best of those above
    Setting("that window, lr 1.5e-3", (*WINDOW, "optimizer.lr=1.5e-3")),
    Setting("CPS, eta 0.8, that window, lr 1e-3", (*CPS, *WINDOW, "optimizer.lr=1e-3")),
    Setting("CPS, eta 0.8, that window, lr 2e-3", (*CPS, *WINDOW, "optimizer.lr=2e-3")),
    Setting("CPS, eta 0.6, that window, lr 1.5e-3", (*CPS, *WINDOW, "objective.eta=0.6", "optimizer.lr=1.5e-3")),
    Setting("CPS, eta 1, that window, lr 1.5e-3", (*CPS, *WINDOW, "objective.eta=1", "optimizer.lr=1.5e-3")),
    Setting("CPS, eta 0.8, a window of 1, lr 1.5e-3", (*CPS, *WINDOW, "objective.window_size=1", "optimizer.lr=1.5e-3")),
    Setting("CPS, eta 0.8, a window of 2 in all steps, lr 1.5e-3", (*CPS, *WINDOW[:2], "optimizer.lr=1.5e-3")),
    Setting("CPS, eta 0.8, that window, lr 1.5e-3, clip 3e-4", (*CPS, *WINDOW, "optimizer.lr=1.5e-3", "objective.clip_range=3e-4")),
)


def job_of(folder: Path, number: int, budget: int, more: tuple[str, ...]) -> Job:
    overrides = (*SETTINGS[number].overrides, *more, *VALIDATION, f"seed={SEARCH_SEED}")
    rollouts = more_rollouts(load_recipe(RECIPE, overrides), 0, budget)
    return Job(folder / f"{number:02}", RECIPE, (*overrides, f"evaluate.every={max(1, rollouts // EVALUATIONS)}"), budget)


def finished(job: Job, setting: Setting) -> dict[str, Any]:
    """What a run came to; `score` is its last evaluation within the first round's budget, also where it went on."""
    costs, scores = load_entry(job.folder).line("evaluations")
    lines, guards = read_lines(job.folder / "metrics.jsonl"), job.folder / "guards.jsonl"
    return {
        "setting": setting.label,
        "overrides": list(setting.overrides),
        "curve_evaluations_score": [[int(cost), round(float(score), 4)] for cost, score in zip(costs, scores, strict=True)],
        "score": round(float(scores[costs <= job.budget][-1]), 4),
        "best_score": round(float(scores.max()), 4),
        "rollouts": len(lines),
        "guards": [line["guard"] for line in read_lines(guards)] if guards.is_file() else [],
        "command": job.command(),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--workers", type=int, default=2, help="processes of one thread each (%(default)s)")
    parser.add_argument("--test", action="store_true", help="also the best setting on the test prompts, three seeds of the whole budget")
    parser.add_argument("--report", action="store_true", help="make no run")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    args = parser.parse_args()
    quieten()
    plan, folder, more = Plan(), args.folder.resolve(), tuple(args.overrides)

    def run(jobs: list[Job]) -> None:
        if not args.report:
            run_all(jobs, args.workers, lambda line: print(line, flush=True), expected)

    jobs = [job_of(folder, number, plan.search_budget, more) for number in range(len(SETTINGS))]
    run(jobs)
    entries = [finished(job, setting) for job, setting in zip(jobs, SETTINGS, strict=True) if job.finished()]
    test: list[dict[str, Any]] = []
    if len(entries) == len(jobs):
        close = finalists([entry["score"] for entry in entries])
        longer = [final_job(jobs[number], plan) for number in close]
        run(longer)
        if all(job.finished() for job in longer):
            for number in close:
                final = load_entry(jobs[number].folder).scores[-DECIDED_BY:].mean()
                entries[number] = finished(jobs[number], SETTINGS[number]) | {"final": round(float(final), 4)}
            best = max(close, key=lambda number: entries[number]["final"])
            entries[best]["chosen"] = True
            tests = main_jobs(folder, plan, METHOD, (*SETTINGS[best].overrides, *more))
            if args.test:
                run(tests)
            test = [entry_of(job, method=METHOD) for job in tests if job.finished()]
    for entry in entries:
        told = f"{entry['final']:.3f}" if "final" in entry else "     "
        print(f"{entry['score']:.3f}  {told}  best {entry['best_score']:.3f}  {entry['setting']}{'  <- chosen' * ('chosen' in entry)}")
    for entry in test:
        print(f"test, seed {entry['seed']}: {entry['final_score']:.3f}, best {entry['best_score']:.3f}")
    write_json(
        RESULTS,
        {
            "command": "python " + " ".join(["benchmarks/grpo_search.py", *sys.argv[1:]]),
            "machine": machine(threads=1),
            "prompts": "playground-search, 240 images of its validation prompts, EMA weights",
            "seed": SEARCH_SEED,
            "budget": plan.search_budget,
            "runs": entries,
            "test": test,
        },
    )


if __name__ == "__main__":
    main()
