"""What a rollout of each method costs at SD3.5-Medium's size: seconds, memory and utilisation, on one GPU.

    python benchmarks/models.py full /tmp/full                          # random weights, 16 GB, written once
    python benchmarks/objectives.py --model /tmp/full                   # every method's published recipe
    python benchmarks/objectives.py --model /tmp/full --recipes sd35m-geneval,sd35m-grpo --images 24

Each recipe takes one prompt's group, with the playground's prompts and the mean brightness as a reward, so that nothing but the
method differs; the second rollout counts, after one in which micro-batches were found. Text encoders and VAE are read once.
On a CPU, with `models.py small`, the same goes on for its own sake: what it tells of a GPU is nothing.
"""

import argparse
import copy
import gc
import json
import os
import sys
import tempfile
from pathlib import Path
from typing import Any
from unittest.mock import patch

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")

from clocks import begin_memory, needed_operations, peak_memory, peak_rate, timed_step
from step import COMMON, machine, stand_ins

from flowtilt import Trainer, load_recipe
from flowtilt.models import opening

NFT = "sd35m-geneval"
RECIPES = [NFT, *(f"sd35m-{name}" for name in ("awm", "ram", "epg", "pepg", "par", "grpo", "grpo-fast", "grpo-guard"))]


class Kept:
    """`load_pipeline` that reads a folder once: every call gives the same text encoders and VAE, and a new copy of the network."""

    def __init__(self) -> None:
        self._load, self._pipeline, self._network = opening.load_pipeline, None, None

    def __call__(self, path: str, **how: Any) -> Any:
        if self._pipeline is None:
            self._pipeline: Any = self._load(path, **how)
            # in the computer's memory, where it is in nobody's peak
            self._network: Any = copy.deepcopy(self._pipeline.transformer).to("cpu")
        else:
            self._pipeline.transformer = None  # the one before goes first
            gc.collect()
            self._pipeline.register_modules(transformer=copy.deepcopy(self._network).to(how["device"]))
        return self._pipeline


def measure(name: str, images: int, overrides: list[str], run: Path) -> dict[str, Any]:
    """A rollout of the recipe `name` and its training, after one that is not counted."""
    group = ["rollout.prompts=1", f"rollout.images_per_prompt={images}"]
    recipe = load_recipe(name, [*COMMON, *overrides, *group, f"run={run}"])
    trainer = Trainer(recipe)
    device = trainer.policy.model.device
    operations = needed_operations(trainer)
    trainer._step()
    evaluations = trainer.clock.network_evaluations
    begin_memory(device)  # what did not fit while micro-batches were found is no peak
    metrics, seconds = timed_step(trainer)
    phases = {phase.removeprefix("time/"): value / images for phase, value in metrics.items() if phase.startswith("time/")}
    rate = peak_rate()
    return {
        "recipe": name,
        "images": images,
        "seconds_per_image": seconds / images,
        "phases": phases,
        "evaluations_per_image": (trainer.clock.network_evaluations - evaluations) / images,
        "utilisation": rate and {phase: operations[phase] / images / phases[phase] / rate for phase in operations},
        "peak_gib": peak_memory(device),
        "micro_batch": {kind: trainer.micro_batch.size(kind) for kind in ("sample", "decode", "train")},
        "recomputed": trainer.policy.recomputes,
        "loss": metrics["loss"],
        "grad_norm": metrics["grad_norm"],
        "machine": machine(device),
        "command": "python " + " ".join(["benchmarks/objectives.py", *sys.argv[1:]]),
    }


def line(entry: dict[str, Any], nft: dict[str, Any]) -> str:
    """A row of the table."""
    phases, used, peak = entry["phases"], entry["utilisation"], entry["peak_gib"]
    return "  ".join(
        [
            f"{entry['recipe']:16}",
            f"{entry['seconds_per_image']:.3f} s an image ({entry['seconds_per_image'] / nft['seconds_per_image']:.2f} x NFT)",
            f"sample {phases['sample']:.3f} train {phases['train']:.3f}",
            f"{entry['evaluations_per_image']:.0f} evaluations",
            f"utilisation {used['sample']:.0%} {used['train']:.0%}" if used else "utilisation n/a",
            f"peak {peak['tensors']:.1f} GiB" if peak else "peak n/a",
            f"micro-batch {entry['micro_batch']['sample']} {entry['micro_batch']['train']}",
        ]
    )


def main(words: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, required=True, help="a folder that models.py wrote")
    parser.add_argument("--recipes", type=lambda text: text.split(","), default=RECIPES, help="the first is what others are compared with")
    parser.add_argument("--images", type=int, default=24, help="of the one group (%(default)s)")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results" / "objectives.json")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="of every recipe")
    args = parser.parse_intermixed_args(words)
    entries: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as temporary, patch.object(opening, "load_pipeline", Kept()):
        for name in args.recipes:
            entries.append(measure(name, args.images, [*stand_ins(args.model), *args.overrides], Path(temporary) / name))
            gc.collect()
            print(line(entries[-1], entries[0]), flush=True)
            args.output.write_text(json.dumps(entries, indent=1) + "\n")


if __name__ == "__main__":
    main()
