"""A quarter of DiffusionNFT's evaluations: `playground-fast` over seeds on the test prompts, and what its parts are worth.

    python benchmarks/fast.py --folder runs/fast                          seeds 0 to 4 on the test prompts
    python benchmarks/fast.py --folder runs/fast --ablate                 seeds 100 to 104 on playground-search, one change each
    python benchmarks/fast.py --folder runs/fast --beside                 seeds 100 to 102 there, three methods without and with the guide
    python benchmarks/fast.py model.dtype=bfloat16 --folder runs/half --seeds 0 1 2      the same in half precision
    python benchmarks/fast.py --recipe playground-mend --folder runs/mend --seeds 0 1 2      another recipe in its place
    python benchmarks/fast.py --folder runs/fast --report                 only what is finished there, into results/fast.json

Finished runs in the folder are not made again, nor those that results/fast.json has of the same seed and overrides, so that a series can
be finished on another machine than it was begun on. The figures of DiffusionNFT beside them are those of results/head_to_head.json.
"""

import argparse
import json
import multiprocessing
import statistics
import sys
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import torch
from contest.machine import machine
from contest.measures import measures_of
from contest.settings import Amount

from flowtilt import Trainer, load_recipe
from flowtilt.io.files import read_lines, write_json
from flowtilt.io.run_folder import RunFolder

RESULTS = Path(__file__).parent / "results" / "fast.json"
TARGETS = (0.7, 0.8, 0.85, 0.9)
SEARCH = ("prompts=playground-search", "evaluate.prompts=playground-search")
PLAIN = (
    "objective.guide=0",
    "objective.row_share=1",
    "objective.times_range=[0.02,1.0]",
    "tags={}",
    "rollout.solver=euler",
    "rollout.steps=7",
)
FIRST = "objective.guide=[[0,2.0],[12,0.3],[24,0.0]]"
"""The guide of the recipe as it was when its parts were measured. They showed that one which stays at .3 is better."""
ABLATIONS: dict[str, tuple[str, ...]] = {
    "as it is": (),
    "a guide that ends at rollout 24": (FIRST,),
    "without the guide": ("objective.guide=0",),
    "all noise levels": (FIRST, "objective.times_range=[0.02,1.0]"),
    "all rows": (FIRST, "objective.row_share=1"),
    "tags alike": (FIRST, "tags={}"),
    "the guide alone": (FIRST, *PLAIN[1:]),
    "the base's guided velocity": (FIRST, "objective.guide_of=reference", "objective.guide_scale=3"),
}


def guide(weight: float, ends: int = 24) -> tuple[str, ...]:
    """playground-fast's guide with another weight at the start, over so many rollouts."""
    return (f"objective.guide=[[0,{weight:g}],[{ends // 2},{0.15 * weight:g}],[{ends},0.0]]", "objective.guide_share=1.0")


NFT, AWM, GRPO = (
    ("playground", ("rollouts=30",)),
    ("playground-awm", ("rollouts=30", "objective.anchor=1")),
    ("playground-grpo-fast", ("rollouts=40",)),
)
BESIDE: dict[str, tuple[str, tuple[str, ...]]] = {
    "DiffusionNFT": NFT,
    "DiffusionNFT with the guide": (NFT[0], (*NFT[1], *guide(2.0))),
    "AWM": AWM,
    "AWM with the guide": (AWM[0], (*AWM[1], *guide(0.36))),
    "AWM with the guide at 2": (AWM[0], (*AWM[1], *guide(2.0))),
    "FlowGRPO": GRPO,
    "FlowGRPO with the guide": (GRPO[0], (*GRPO[1], *guide(0.014, 32), "objective.guide_of=old", "objective.guide_scale=2")),
    "FlowGRPO with the base's guide": (GRPO[0], (*GRPO[1], *guide(0.014, 32), "objective.guide_of=reference", "objective.guide_scale=3")),
}
"""Recipes whose settings are those that a search chose, with about as many network evaluations of a run each. A guide's weight is 2 times a
method's own gradient norm over DiffusionNFT's: .0156 and .00058 over .0864 in the first rollout."""


class Run(NamedTuple):
    """One to be made: a folder, a recipe, its overrides with the seed."""

    folder: Path
    recipe: str
    overrides: tuple[str, ...]


def made(run: Run) -> Path:
    """The run, made where it is not finished."""
    folder = RunFolder(run.folder)
    if not folder.summary.is_file():
        torch.set_num_threads(1)
        recipe = load_recipe(run.recipe, [*run.overrides, f"run={run.folder}"])
        Trainer(recipe, resume=run.folder if folder.checkpoints.is_dir() else None).run()
    return run.folder


@dataclass(frozen=True)
class Series:
    """Runs that differ by their seed alone.

    Args:
        overrides: of the recipe, without those of the search prompts.
        search: on playground-search, not on the test prompts.
    """

    name: str
    recipe: str
    overrides: tuple[str, ...]
    search: bool

    def run(self, folder: Path, seed: int) -> Run:
        place = self.name.replace(" ", "-").replace("'", "") if self.search else "test"
        return Run(folder / f"{place}-{seed}", self.recipe, (*(SEARCH if self.search else ()), *self.overrides, f"seed={seed}"))

    def kept(self, known: dict[str, Any]) -> dict[int, dict[str, Any]]:
        """Entries by seed of what the file of results has of the same recipe and overrides."""
        same = known.get("recipe") == self.recipe and known.get("overrides") == [*self.overrides]
        return {found["seed"]: found for found in known["runs"]} if same else {}


def crossing(curve: list[tuple[int, float]], target: float) -> float | None:
    """Network evaluations at which the straight line between evaluations first reaches a score; none where it never does."""
    for (x0, y0), (x1, y1) in pairwise(curve):
        if y1 >= target:
            return x1 if y0 >= target else x0 + (x1 - x0) * (target - y0) / (y1 - y0)
    return None


def entry(folder: Path, measured: bool) -> dict[str, Any]:
    """What a finished run says, and on noise that nothing was compared on its diversity and distance from the base."""
    run, recipe = RunFolder(folder), load_recipe(RunFolder(folder).recipe)
    spent = {line["rollout"]: line["network_evaluations"] for line in read_lines(run.metrics)}
    curve = [(spent.get(e["rollout"], 0), e["score"]) for e in read_lines(run.evaluations)]
    seconds = [(e["seconds"], e["score"]) for e in read_lines(run.evaluations)]
    guards = [line["guard"] for line in read_lines(run.guards)] if run.guards.is_file() else []
    return {
        "seed": recipe.seed,
        "machine": machine(threads=1),
        "curve_evaluations_score": [[x, round(y, 4)] for x, y in curve],
        "evaluations_to": {f"{target:g}": crossing(curve, target) for target in TARGETS},
        "first_at_0.9_seconds": next((x for x, y in seconds if y >= 0.9), None),
        "final_score": round(curve[-1][1], 4),
        "guards": guards,
        **({"measures": measures_of(recipe, folder, Amount(360, 4))} if measured else {}),
    }


def span(values: list[float | None]) -> str:
    """Median and range, and how many of the runs got there."""
    known = [value for value in values if value is not None]
    if len(known) < len(values) or not known:
        return f"{len(known)} of {len(values)}" + (f", first {min(known):,.0f}" if known else "")
    return f"{statistics.median(known):,.0f} ({min(known):,.0f} to {max(known):,.0f})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--seeds", type=int, nargs="+", help="0 to 4; of --ablate 100 to 104, of --beside 100 to 102")
    parser.add_argument("--ablate", action="store_true", help="one change each, on the search prompts")
    parser.add_argument("--beside", action="store_true", help="other methods without and with the guide, on the search prompts")
    parser.add_argument("--report", action="store_true", help="make no run")
    parser.add_argument("--recipe", default="playground-fast", help="another one, on the test prompts")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    parser.add_argument("--workers", type=int, default=2, help="processes of one thread each (%(default)s)")
    args = parser.parse_args()
    search = args.ablate or args.beside
    if search and args.recipe != "playground-fast":
        parser.error("--ablate and --beside are of recipes of their own; --recipe is for the test prompts")
    seeds = args.seeds or (range(100, 105) if args.ablate else range(100, 103) if args.beside else range(5))
    wanted: dict[str, tuple[str, tuple[str, ...]]] = {}
    if args.ablate:
        wanted |= {name: ("playground-fast", change) for name, change in ABLATIONS.items()}
    if args.beside:
        wanted |= {name: (recipe, (*own, "evaluate.every=5")) for name, (recipe, own) in BESIDE.items()}
    if not search:
        other = [] if args.recipe == "playground-fast" else [args.recipe]
        wanted[" ".join(["test", *other, *args.overrides])] = args.recipe, ()
    known = json.loads(RESULTS.read_text()) if RESULTS.is_file() else {}
    series = {name: Series(name, recipe, (*change, *args.overrides), search) for name, (recipe, change) in wanted.items()}
    kept = {name: one.kept(known.get(name, {})) for name, one in series.items()}
    # a seed of every series before the next seed: what is interrupted compares as many of each
    runs = {(name, seed): one.run(args.folder, seed) for seed in seeds for name, one in series.items() if seed not in kept[name]}
    if runs and not args.report:
        with ProcessPoolExecutor(args.workers, multiprocessing.get_context("forkserver")) as pool:
            for number, folder in enumerate(pool.map(made, runs.values()), start=1):
                print(f"{number} of {len(runs)}: {folder.name}", flush=True)
    for name, one in series.items():
        new = [entry(run.folder, not search) for (of, _), run in runs.items() if of == name and RunFolder(run.folder).summary.is_file()]
        if not (entries := sorted([*kept[name].values(), *new], key=lambda found: found["seed"])):
            continue
        known[name] = {
            "recipe": one.recipe,
            "overrides": [*one.overrides],
            "prompts": "playground-search, validation" if search else "playground, test",
            "command": "python " + " ".join(["benchmarks/fast.py", *sys.argv[1:]]),
            "runs": entries,
        }
        write_json(RESULTS, known)
        reached = "; ".join(f"{target:g}: {span([e['evaluations_to'][f'{target:g}'] for e in entries])}" for target in TARGETS)
        print(f"{name}: {reached}; final {statistics.median(e['final_score'] for e in entries):.3f}")


if __name__ == "__main__":
    main()
