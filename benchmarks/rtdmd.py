"""RTDMD on the playground over seeds: the teacher, the 4-step student, and what reinforces it further at equal compute.

    python benchmarks/rtdmd.py                  all of it, then the page and its picture
    python benchmarks/rtdmd.py cold report      the first stage alone

Each run is a recipe as it ships. The second stage and few-step NFT go on from the same student, on as many network
evaluations. What is finished is skipped, what was interrupted goes on.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from contest.page import drawn, write_plot
from contest.results import entry_of
from contest.rtdmd_page import TEACHER, picture, with_table
from contest.running import Job, run_all
from contest.settings import Amount

from flowtilt.build import evaluation_prompts, load_rewards, training_prompts
from flowtilt.config import load_recipe
from flowtilt.device.micro_batch import MicroBatch
from flowtilt.distributed.world import World
from flowtilt.evaluate import evaluate
from flowtilt.io.files import write_atomic, write_json
from flowtilt.io.quiet import quieten
from flowtilt.models.opening import open_model
from flowtilt.plan.passes import passes_in_all
from flowtilt.policy.tuned_model import TunedModel
from flowtilt.sampling.sampler import Sampler

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "rtdmd.json"
PAGE = ROOT / "docs" / "guides" / "few-steps.md"
CURVES = ROOT / "docs" / "images" / "rtdmd.svg"
PICTURE = ROOT / "docs" / "images" / "rtdmd.png"
BUDGET = 160_000
"""Network evaluations of each run that goes on from a student, a backward pass counting two."""
SECOND = {"rl": "playground-rtdmd-rl", "nft": "playground-fewstep-nft"}
AMOUNT = Amount(images=360, copies=4)


def cold(folder: Path, seed: int) -> Job:
    """The student of a seed: the recipe's own number of steps."""
    recipe = load_recipe("playground-rtdmd-cold")
    return Job(folder / f"cold-{seed}", recipe.name, (f"seed={seed}",), passes_in_all(recipe).evaluations, AMOUNT)


def second(folder: Path, name: str, seed: int) -> Job:
    """What goes on from it."""
    overrides = (f"seed={seed}", f"lora.on={json.dumps([str(folder / f'cold-{seed}')])}")
    return Job(folder / f"{name}-{seed}", SECOND[name], overrides, BUDGET, AMOUNT)


def teacher(seed: int) -> dict[str, Any]:
    """The base with guidance in 20 steps, and without in the student's 4, on the noise of a seed's evaluations."""
    recipe = load_recipe("playground-rtdmd-cold", [f"seed={seed}"])
    e = recipe.evaluate
    stack = TunedModel(open_model(recipe.model, torch.device("cpu")), [])
    _, eval_rewards = load_rewards(recipe, torch.device("cpu"))
    prompts = evaluation_prompts(recipe, training_prompts(recipe))
    found = {}
    samplers = {
        "teacher": TEACHER,
        "base": Sampler("euler", 20),
        "base in 4 steps": Sampler(e.solver, e.steps, 1.0, e.eta),
    }
    for name, sampler in samplers.items():
        scored = evaluate(
            stack, "base", prompts, eval_rewards, sampler, images=e.images, column=e.rewards[0], seed=seed, samples=0,
            micro_batch=MicroBatch("auto", "cpu"), world=World(0, 1, torch.device("cpu")),
        )  # fmt: skip
        found[name] = scored.score
    return {"seed": seed, **found}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stages", nargs="*", choices=["cold", "second", "report"], default=["cold", "second", "report"])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--folder", type=Path, default=Path("runs/rtdmd"), help="of all runs (%(default)s)")
    parser.add_argument("--workers", type=int, default=2, help="processes of one thread each (%(default)s)")
    args = parser.parse_args()
    quieten()
    folder, seeds = args.folder.resolve(), args.seeds
    students = [cold(folder, seed) for seed in seeds]
    if "cold" in args.stages:
        run_all(students, args.workers, _say, lambda job: job.budget / 1000)
    if "second" in args.stages:
        jobs = [second(folder, name, seed) for seed in seeds for name in SECOND]
        run_all(jobs, args.workers, _say, lambda job: job.budget / 1000)
    if "report" in args.stages:
        report(folder, seeds, students)


def report(folder: Path, seeds: Sequence[int], students: Sequence[Job]) -> None:
    """Results of what is finished, the page's table, and the picture of the first seed."""
    jobs = {"cold": students, **{name: [second(folder, name, seed) for seed in seeds] for name in SECOND}}
    entries = [entry_of(job, method=name) for name, own in jobs.items() for job in own if job.finished()]
    for entry in entries:  # wherever the runs lie
        entry["command"] = entry["command"].replace(f"{folder}/", "runs/rtdmd/")
    if not entries:
        sys.exit(f"{folder}: no run is finished yet")
    kept = folder / "teacher.json"
    told = json.loads(kept.read_text()) if kept.is_file() else []
    told += [teacher(seed) for seed in seeds if seed not in [one["seed"] for one in told]]
    write_json(kept, told)
    found = {"command": "python benchmarks/rtdmd.py", "budget": BUDGET, "teacher": told, "entries": entries}
    write_json(RESULTS, found)
    picture(PICTURE, {name: own[0].folder for name, own in jobs.items() if own[0].finished()})
    write_plot(CURVES, drawn(entries))
    if PAGE.is_file():
        write_atomic(PAGE, with_table(PAGE.read_text(encoding="utf-8"), found))
    _say(f"results  {RESULTS}\npicture  {PICTURE}\npage     {PAGE}")


def _say(line: str) -> None:
    print(line, flush=True)


if __name__ == "__main__":
    main()
