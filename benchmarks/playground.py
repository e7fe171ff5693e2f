"""The playground recipe over seeds: score before and after, and the curve between.

    python benchmarks/playground.py --seeds 0 1 2 3 4
    python benchmarks/playground.py --seeds 0 1 2 3 4 --name playground_long rollouts=180

Each run is the recipe as it ships, with the overrides given here. Every evaluation uses the test prompts,
EMA weights and no guidance; a second evaluation at the end takes other noise, on which nothing was ever compared.
"""

import argparse
import json
import statistics
import sys
import tempfile
from pathlib import Path

from contest.machine import machine

from flowtilt import Trainer, load_recipe
from flowtilt.build import sampler_of
from flowtilt.evaluate import evaluate
from flowtilt.io.files import read_lines

FRESH_NOISE = 1_000_003


def fresh(trainer: Trainer, role: str, images: int) -> dict:
    """Scores on noise that no other evaluation of any seed has used."""
    e = trainer.recipe.evaluate
    found = evaluate(
        trainer.policy,
        role,
        trainer.test_prompts,
        trainer.eval_rewards,
        sampler_of(e),
        images=images,
        column=e.rewards[0],
        seed=FRESH_NOISE,
        samples=0,
        micro_batch=trainer.micro_batch,
        world=trainer.world,
    )
    return {"score": found.score, "by_tag": found.by_tag, "images": images}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--name", default="playground", help="of the result file")
    parser.add_argument("--images", type=int, default=480, help="of the evaluation on fresh noise")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    args = parser.parse_args()
    output = Path(__file__).parent / "results" / f"{args.name}.json"
    entries = []
    for seed in args.seeds:
        with tempfile.TemporaryDirectory() as folder:
            trainer = Trainer(load_recipe("playground", [*args.overrides, f"seed={seed}", f"run={folder}/run"]))
            before = fresh(trainer, "reference", args.images)
            summary = trainer.run()
            assert summary is not None
            curve = [
                [e["rollout"], round(e["seconds"], 2), round(e["score"], 4)] for e in read_lines(trainer.run_folder / "evaluations.jsonl")
            ]
            entry = {
                "method": trainer.recipe.objective.type,
                "seed": seed,
                "seconds": summary["seconds"],
                "network_evaluations": trainer.clock.network_evaluations,
                "curve_step_seconds_score": curve,
                "first_at_0.9_seconds": next((seconds for _, seconds, score in curve if score >= 0.9), None),
                "best_score": max(score for *_, score in curve),
                "final_score": curve[-1][2],
                "fresh_noise": {"before": before, "after": fresh(trainer, "ema", args.images)},
                "protocol": summary["protocol"],
                "command": "python " + " ".join(["benchmarks/playground.py", *sys.argv[1:]]),
                "machine": machine(),
            }
        entries.append(entry)
        output.write_text(json.dumps(entries, indent=1) + "\n")
        again = entry["fresh_noise"]["after"]["score"]
        print(f"seed {seed}: {curve[0][2]:.3f} -> {curve[-1][2]:.3f}; fresh {before['score']:.3f} -> {again:.3f}")
    finals = [entry["final_score"] for entry in entries]
    again = [entry["fresh_noise"]["after"]["score"] for entry in entries]
    for label, values in (("final", finals), ("fresh noise", again)):
        print(f"{label}: median {statistics.median(values):.3f}, {min(values):.3f} to {max(values):.3f} over {len(values)} seeds")


if __name__ == "__main__":
    main()
