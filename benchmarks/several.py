"""Several rewards at once on the playground: the ways to combine two and three, over seeds, at equal compute.

    python benchmarks/several.py --folder runs/several             all of it
    python benchmarks/several.py --folder runs/several --report    only what is finished there, into results/several.json

Two rewards: the verifier and its smooth twin, which agree. Three: a taste for blue as well, which pulls away from every caption
that names another colour. DiffusionNFT with the playground's settings throughout; prompts and validation of playground-search, so that
nothing here is chosen on test prompts. What counts is where each reward stands at the end, measured by an evaluation of 240 images.
"""

import argparse
import json
import statistics
from pathlib import Path
from typing import Any

import torch
from contest.running import Job, run_all
from torch import Tensor

from flowtilt.io.environment import processor
from flowtilt.io.files import read_lines, write_json
from flowtilt.io.run_folder import RunFolder

RESULTS = Path(__file__).parent / "results" / "several.json"
BUDGET = 60_000
SECONDS = 75.0
WAYS = ("sum", "normalized", "group", "marble")
SETS = {"two": ("playground", "smooth"), "three": ("playground", "smooth", "blue")}
WATCHED = ("playground_strict", "smooth", "blue")
SOURCES = {"smooth": "playground_smooth", "blue": f"{Path(__file__)}:blue"}


def blue(images: Tensor, prompts: list[Any]) -> Tensor:
    """How much bluer than red and green an image [N, 3, H, W] is on average, in (-1, 1); [N]."""
    means = images.float().mean((2, 3))
    return means[:, 2] - means[:, :2].mean(1)


def job(folder: Path, rewards: str, way: str, seed: int) -> Job:
    """A run to the budget."""
    added = [f'rewards.{name}={{source="{SOURCES[name]}",weight=1}}' for name in SETS[rewards] if name in SOURCES]
    watched = [f'rewards.{name}={{source="{source}",weight=0}}' for name, source in SOURCES.items() if name not in SETS[rewards]]
    overrides = (
        *added,
        *watched,
        f"combine={way}",
        "prompts=playground-search",
        "evaluate.prompts=playground-search",
        'evaluate.rewards=["playground_strict","smooth","blue"]',
        "evaluate.samples=0",
        "evaluate.every=14",
        f"seed={seed}",
    )
    return Job(folder / f"{rewards}-{way}-{seed}", "playground", overrides, BUDGET)


def entry(folder: Path) -> dict[str, Any]:
    """Where each reward stood at the start and at the end, and what MARBLE's weights were."""
    run = RunFolder(folder)
    first, *_, last = list(read_lines(run.evaluations))
    lines = list(read_lines(run.metrics))
    told = {name.removeprefix("marble/"): round(value, 4) for name, value in lines[-1].items() if name.startswith("marble/")}
    rewards = {
        name: [round(first["rewards"][name], 4), round(last["rewards"][name], 4)] for name in ("playground_strict", "smooth", "blue")
    }
    guards = [line["guard"] for line in read_lines(run.guards)] if run.guards.is_file() else []
    return {"network_evaluations": lines[-1]["network_evaluations"], "first_and_last": rewards, "marble": told, "guards": guards}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--seeds", type=int, nargs="+", default=[100, 101, 102])
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--report", action="store_true", help="make no run")
    args = parser.parse_args()
    folder = args.folder.resolve()
    # a seed of every way before the next seed: what is interrupted compares as many of each
    named = [((rewards, way), job(folder, rewards, way, seed)) for seed in args.seeds for rewards in reversed(SETS) for way in WAYS]
    if not args.report:
        run_all([job for _, job in named], args.workers, print, lambda job: SECONDS)
    found: dict[str, list[dict[str, Any]]] = {}
    for (rewards, way), made in named:
        if made.finished():
            found.setdefault(f"{rewards} {way}", []).append(entry(made.folder))
    for name, runs in found.items():
        ends = {reward: [run["first_and_last"][reward][1] for run in runs] for reward in WATCHED}
        told = [f"{reward} {statistics.median(own):.3f} ({min(own):.3f} to {max(own):.3f})" for reward, own in ends.items()]
        print(f"{name}: {', '.join(told)}")
    machine = f"{processor()}, 1 thread, torch {torch.__version__}"
    known = json.loads(RESULTS.read_text()) if RESULTS.is_file() else {}
    write_json(RESULTS, known | {"budget": BUDGET, "seeds": args.seeds, "machine": machine, "runs": found})


if __name__ == "__main__":
    main()
