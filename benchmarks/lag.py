"""What a lag costs in learning, and what it gains in time: `rollout.lag` 0, 1 and 2 on the playground.

    python benchmarks/lag.py --folder runs/lag                 learning: playground-fast with its first guide, seeds 0 to 2, test prompts
    python benchmarks/lag.py objective.beta=0.5 --folder runs/lag-beta --lags 1        the same with another key
    python benchmarks/lag.py --folder runs/lag --speed         images per second with a judge as slow as sampling and training together
    python benchmarks/lag.py --folder runs/lag --report        only what is finished there

Both write results/lag.json. Finished runs in the folder are not made again. The judge of `--speed` is a reward that sleeps behind
`flowtilt serve-rewards`; the recipe has DiffusionNFT's published numbers, 10 steps of dpm2 and 9 noise levels of each image. On a GPU
training takes a larger share of the time than here: rollout.steps=5 objective.times_per_image=12 has the share of sd35m-geneval on an H200.
"""

import argparse
import json
import re
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from contest.machine import machine
from fast import FIRST as GUIDE
from fast import RESULTS as FAST
from fast import crossing, span

from flowtilt import Trainer, load_recipe
from flowtilt.io.files import read_lines, write_json
from flowtilt.io.run_folder import RunFolder

RESULTS = Path(__file__).parent / "results" / "lag.json"
TARGETS = (0.7, 0.8, 0.85, 0.9)
LEARNING: dict[str, tuple[str, ...]] = {"playground-fast": (GUIDE,), "playground": ("rollouts=160", "evaluate.every=10")}
SPEED = (
    "rollout.solver=dpm2",
    "rollout.steps=10",
    "objective.times_per_image=9",
    "evaluate.every=0",
    "evaluate.images=6",
    "evaluate.steps=1",
    'evaluate.rewards=["playground_strict"]',
    "checkpoint.every=1000",
)
FIRST = 2
"""Rollouts that are not timed: the first one samples what is to be under way."""
JUDGE = """
import time

class Judge:
    def __call__(self, images, prompts):
        time.sleep({seconds} * len(images))
        return images[:, 0].mean((1, 2))
"""


def learned(folder: Path) -> dict[str, Any]:
    """What a finished run says."""
    run, recipe = RunFolder(folder), load_recipe(RunFolder(folder).recipe)
    spent = {line["rollout"]: line["network_evaluations"] for line in read_lines(run.metrics)}
    curve = [(spent.get(e["rollout"], 0), e["score"]) for e in read_lines(run.evaluations)]
    return {
        "seed": recipe.seed,
        "curve_evaluations_score": [[x, round(y, 4)] for x, y in curve],
        "evaluations_to": {f"{target:g}": crossing(curve, target) for target in TARGETS},
        "final_score": round(curve[-1][1], 4),
        "seconds": json.loads(run.summary.read_text())["seconds"],
        "guards": [line["guard"] for line in read_lines(run.guards)] if run.guards.is_file() else [],
    }


def learning(args: argparse.Namespace) -> dict[str, Any]:
    """Runs of every lag and seed."""
    found: dict[str, Any] = {}
    for seed in args.seeds:
        for lag in args.lags:
            folder = args.folder / f"{args.recipe}-lag-{lag}-seed-{seed}"
            run = RunFolder(folder)
            if not args.report and not run.summary.is_file() and (lag or args.again or args.recipe != "playground-fast"):
                words = [*LEARNING[args.recipe], *args.overrides, f"rollout.lag={lag}", f"seed={seed}", f"run={folder}"]
                Trainer(load_recipe(args.recipe, words), resume=folder if run.checkpoints.is_dir() else None).run()
            if run.summary.is_file():
                found.setdefault(f"lag {lag}", []).append(learned(folder))
            elif not lag and args.recipe == "playground-fast" and not args.overrides:  # measured before
                known = {entry["seed"]: entry for entry in json.loads(FAST.read_text())[f"test {GUIDE}"]["runs"]}
                wanted = ("seed", "curve_evaluations_score", "evaluations_to", "final_score", "guards")
                found.setdefault("lag 0", []).append({key: known[seed][key] for key in wanted} | {"from": FAST.name})
    for name, runs in found.items():
        reached = "; ".join(f"{target:g}: {span([run['evaluations_to'][f'{target:g}'] for run in runs])}" for target in TARGETS)
        print(f"{name}: {reached}; final {statistics.median(run['final_score'] for run in runs):.3f}")
    return {"recipe": args.recipe, "overrides": [*LEARNING[args.recipe], *args.overrides], "prompts": "playground, test", "runs": found}


@contextmanager
def served(seconds: float, folder: Path) -> Iterator[str]:
    """The address of a judge that sleeps so long for each image."""
    (folder / "judge.py").write_text(JUDGE.format(seconds=seconds))
    words = ["serve-rewards", "--rewards", f"judge={folder}/judge.py:Judge", "--port", "0"]
    process = subprocess.Popen([sys.executable, "-m", "flowtilt", *words], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    try:
        assert process.stdout
        for line in process.stdout:
            if address := re.search(r"http://[\w.:-]+:\d+", line):
                yield address[0]
                break
        else:
            raise SystemExit("the reward server did not start")
    finally:
        process.terminate()
        process.wait()


def paced(lag: int, seconds: float, rollouts: int, overrides: Sequence[str]) -> dict[str, float]:
    """Images per second with a lag, and seconds of a rollout by what they were spent on."""
    with tempfile.TemporaryDirectory() as place, served(seconds, Path(place)) as address:
        words = [
            *SPEED,
            *overrides,
            f"rewards.judge={address}",
            "rewards.playground=0",
            f"rollout.lag={lag}",
            f"rollouts={FIRST + rollouts + lag}",
            f"run={place}/run",
        ]
        trainer = Trainer(load_recipe("playground", words))
        lines = [dict(metrics) for metrics in trainer]
    timed = lines[FIRST : FIRST + rollouts]
    total = sum(trainer.method.images / line["images_per_second"] for line in timed)
    phases = {name: sum(line[f"time/{name}"] for line in timed) / rollouts for name in ("sample", "decode", "reward", "train")}
    images = trainer.method.images
    return {"images": images, "images_per_second": images * rollouts / total, "seconds": total / rollouts, **phases}


def speed(args: argparse.Namespace) -> dict[str, Any]:
    """Images per second of every lag with one judge, in one process."""
    alone = paced(0, 0.0, args.rollouts, args.overrides)
    work = alone["sample"] + alone["decode"] + alone["train"]
    seconds = work / alone["images"]
    found: dict[str, Any] = {"sampling_and_training_seconds": work, "judge_seconds_per_rollout": work, "without_judge": alone}
    for lag in args.lags:
        found[f"lag {lag}"] = paced(lag, seconds, args.rollouts, args.overrides)
    for lag in args.lags[1:]:
        found[f"ratio of lag {lag}"] = found[f"lag {lag}"]["images_per_second"] / found[f"lag {args.lags[0]}"]["images_per_second"]
    print(json.dumps(found, indent=1))
    return {"overrides": [*SPEED, *args.overrides], "rollouts": args.rollouts, **found}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--recipe", default="playground-fast", choices=list(LEARNING))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--lags", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--rollouts", type=int, default=6, help="that --speed times")
    parser.add_argument("--speed", action="store_true", help="time a slow judge instead")
    parser.add_argument(
        "--again", action="store_true", help="make the runs of playground-fast without a lag, too, which results/fast.json has"
    )
    parser.add_argument("--report", action="store_true", help="make no run")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    args = parser.parse_args()
    part = " ".join(["speed", *args.overrides] if args.speed else [f"learning, {args.recipe}", *args.overrides])
    told = speed(args) if args.speed else learning(args)
    known = json.loads(RESULTS.read_text()) if RESULTS.is_file() else {}
    known[part] = {"command": "python " + " ".join(["benchmarks/lag.py", *sys.argv[1:]]), "machine": machine(), **told}
    write_json(RESULTS, known)


if __name__ == "__main__":
    main()
