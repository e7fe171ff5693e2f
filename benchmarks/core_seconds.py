"""What a network evaluation costs in core-seconds with each method of the comparison, and so what a score costs in core-seconds.

    OMP_NUM_THREADS=1 python benchmarks/core_seconds.py              # some minutes; writes results/core_seconds.json and prints the table

The comparison counts network evaluations. Sampling, losses and rewards around them differ between methods. Rollouts of each method's recipe
on the playground are made in turns in one process, without evaluations; the first two of each are not timed. Seconds are the processor's
own for this process, and the least of the rounds counts: what else a shared machine does only lengthens them.
"""

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from contest.machine import machine
from contest.page import LADDER
from contest.settings import METHODS
from fast import crossing

from flowtilt import Trainer, load_recipe
from flowtilt.io.files import write_json

RESULTS = Path(__file__).parent / "results"
PLAIN = ("evaluate.every=0", "evaluate.images=6", "evaluate.steps=1", "checkpoint.every=1000", "rollouts=1000")
FIRST = 2
"""Rollouts of each method that are not timed: in the first the old policy equals the current one."""
OWN = {"fast": "playground-fast", "grpo-fast": "playground-grpo-fast"}
"""Beside the methods of the search."""


def rollouts(recipe: str, folder: Path) -> Iterator[tuple[float, int]]:
    """Core-seconds and network evaluations of one rollout after another."""
    trainer, spent = Trainer(load_recipe(recipe, [*PLAIN, f"run={folder}"])), 0
    lines, begin = iter(trainer), time.process_time()
    for line in lines:
        seconds, now = time.process_time() - begin, int(line["network_evaluations"])
        yield seconds, now - spent
        spent, begin = now, time.process_time()


def curves() -> dict[str, list[list[tuple[int, float]]]]:
    """Of each method and seed of the comparison: network evaluations and scores."""
    found: dict[str, list[list[tuple[int, float]]]] = {}
    entries = json.loads((RESULTS / "head_to_head.json").read_text())["entries"]
    fast = json.loads((RESULTS / "fast.json").read_text())["test"]["runs"]
    for one in [*entries, *({**run, "method": "fast"} for run in fast)]:
        found.setdefault(one["method"], []).append([(x, y) for x, y in one["curve_evaluations_score"]])
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=4, help="timed rollouts of each method (%(default)s)")
    args = parser.parse_args()
    torch.set_num_threads(1)
    recipes = {name: method.recipe for name, method in METHODS.items()} | OWN
    each: dict[str, list[float]] = {name: [] for name in recipes}
    with tempfile.TemporaryDirectory() as place:
        running = {name: rollouts(recipe, Path(place) / name) for name, recipe in recipes.items()}
        for number in range(FIRST + args.rounds):
            for name, made in running.items():
                seconds, evaluations = next(made)
                if number >= FIRST:
                    each[name].append(1000 * seconds / evaluations)
            print(f"round {number + 1} of {FIRST + args.rounds}", flush=True)
    base, measured, found = min(each["nft"]), curves(), {}
    for name, values in each.items():
        least = min(values)
        reached = {f"{score:g}": [crossing(curve, score) for curve in measured[name]] for score in LADDER}
        costs = {score: sorted(at * least / 1000 if at else float("inf") for at in places) for score, places in reached.items()}
        median = {score: statistics.median_low(places) for score, places in costs.items() if places}
        found[name] = {
            "recipe": recipes[name],
            "core_seconds_of_1000_evaluations": [round(value, 4) for value in values],
            "against_nft": round(least / base, 3),
            "core_seconds_to": {score: round(value) for score, value in median.items() if value < float("inf")},
        }
        told = ", ".join(f"{score}: {value}" for score, value in found[name]["core_seconds_to"].items())
        print(f"{name}: {least:.2f} (to {max(values):.2f}), {found[name]['against_nft']:.2f} x nft; to {told}")
    command = " ".join(["python benchmarks/core_seconds.py", *sys.argv[1:]])
    write_json(RESULTS / "core_seconds.json", {"command": command, "machine": machine(threads=1), "methods": found})


if __name__ == "__main__":
    main()
