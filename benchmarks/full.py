"""All weights beside a LoRA: the playground's recipe, at the same rollouts, seed and evaluation.

    python benchmarks/full.py --rollouts 40 --lr 4e-4

The LoRA has the recipe's own learning rate. Scores are of the test prompts, EMA weights, no guidance.
"""

import argparse
import sys
import tempfile
from pathlib import Path

from contest.machine import machine

from flowtilt import Trainer, load_recipe
from flowtilt.io.files import read_lines, write_json


def main() -> None:
    parser = argparse.ArgumentParser(description="All weights beside a LoRA on the playground.")
    parser.add_argument("--rollouts", type=int, default=40)
    parser.add_argument("--lr", default="4e-4", help="of all weights")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    entries = []
    for train, own in (("full", [f"optimizer.lr={args.lr}"]), ("lora", [])):
        with tempfile.TemporaryDirectory() as folder:
            shared = [f"rollouts={args.rollouts}", f"seed={args.seed}", "checkpoint.every=100", f"run={folder}/run"]
            trainer = Trainer(load_recipe("playground", [f"train={train}", *own, *shared]))
            summary = trainer.run()
            assert summary is not None
            curve = [[e["rollout"], round(e["score"], 4)] for e in read_lines(trainer.run_folder / "evaluations.jsonl")]
            entries.append(
                {
                    "train": train,
                    "trained_weights": sum(weight.numel() for weight in trainer.policy.parameters),
                    "lr": trainer.recipe.optimizer.lr,
                    "seed": args.seed,
                    "rollouts": args.rollouts,
                    "seconds": summary["seconds"],
                    "curve_step_score": curve,
                    "protocol": summary["protocol"],
                    "command": "python " + " ".join(["benchmarks/full.py", *sys.argv[1:]]),
                    "machine": machine(),
                }
            )
            write_json(Path(__file__).parent / "results" / "full.json", entries)
            print(train, curve, flush=True)


if __name__ == "__main__":
    main()
