"""Kills a training run with SIGKILL at random instants until it ends, and compares every bit with an unbroken run.

    python benchmarks/kill_and_resume.py --kills 100

Checkpoints are written after every rollout here, so that kills meet every part of a step and of a write.
"""

import argparse
import json
import multiprocessing
import os
import random
import signal
import sys
import tempfile
import time
from pathlib import Path

import torch
from contest.machine import machine

from flowtilt import Trainer, load_recipe
from flowtilt.io.files import read_lines
from flowtilt.runs import checkpoint
from flowtilt.runs.folder import open_run

QUICK = [
    "rollout.prompts=6",
    "rollout.images_per_prompt=4",
    "rollout.steps=4",
    "objective.times_per_image=2",
    "evaluate.every=5",
    "evaluate.images=12",
    "evaluate.steps=4",
    "evaluate.samples=6",
    "checkpoint.every=1",
]
CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["flowtilt.training.trainer"])


def train(folder: Path, steps: int) -> None:
    torch.set_num_threads(1)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
    if (folder / "recipe.toml").exists():
        Trainer(open_run(folder, []), resume=folder).run()
    else:
        Trainer(load_recipe("playground", [*QUICK, f"rollouts={steps}", f"run={folder}"])).run()


def contents(run: Path) -> tuple:
    last = checkpoint.newest(run)
    assert last is not None
    tensors = {f"{file}.{name}": value.numpy().tobytes() for file, kept in last.tensors.items() for name, value in kept.items()}
    logs = [
        [{k: v for k, v in record.items() if "second" not in k and "time/" not in k} for record in read_lines(run / name)]
        for name in ("metrics.jsonl", "evaluations.jsonl")
    ]
    return last.step, tensors, logs, {path.relative_to(run): path.read_bytes() for path in (run / "samples").rglob("*.png")}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--steps", type=int, default=40, help="rollouts of a run")
    parser.add_argument("--seed", type=int, default=0, help="of the instants")
    parser.add_argument("--within", type=float, default=4.0, help="seconds from a start to its kill, at most; more on a slow machine")
    args = parser.parse_args()
    rng, kills, runs, equal, at = random.Random(args.seed), 0, 0, 0, []
    with tempfile.TemporaryDirectory() as scratch:
        whole = Path(scratch) / "whole"
        process = CONTEXT.Process(target=train, args=(whole, args.steps))
        process.start()
        process.join()
        expected = contents(whole)
        while kills < args.kills:
            folder = Path(scratch) / f"run-{runs}"
            while True:
                process = CONTEXT.Process(target=train, args=(folder, args.steps))
                process.start()
                process.join(rng.uniform(0.3, args.within) if kills < args.kills else None)
                if process.exitcode is not None:
                    assert process.exitcode == 0, f"exit {process.exitcode}"
                    break
                os.kill(process.pid or 0, signal.SIGKILL)
                process.join()
                kills += 1
                at.append(len(read_lines(folder / "metrics.jsonl")) if folder.exists() else -1)
            runs += 1
            equal += contents(folder) == expected
            print(f"{kills} kills, {equal} of {runs} runs ended in the same bits", flush=True)
    entry = {
        "method": "nft",
        "seed": args.seed,
        "kills": kills,
        "runs": runs,
        "runs_with_the_same_bits": equal,
        "rollouts_done_at_each_kill": at,
        "command": "python " + " ".join(["benchmarks/kill_and_resume.py", *sys.argv[1:]]),
        "machine": machine(threads=1),
        "date": time.strftime("%Y-%m-%d"),
    }
    results = Path(__file__).parent / "results" / "kill_and_resume.json"
    others = [other for other in json.loads(results.read_text()) if other["command"] != entry["command"]]
    results.write_text(json.dumps([*others, entry], indent=1) + "\n")
    sys.exit(equal != runs)


if __name__ == "__main__":
    main()
