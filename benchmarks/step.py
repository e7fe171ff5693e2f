"""One NFT step: flowtilt against a plain loop of the reference's structure, in turns, in one process.

On a CPU:
    python benchmarks/step.py --rounds 5                                    # the playground
    python benchmarks/step.py --model small --rounds 3 model.dtype=float32  # SD3.5-Medium's structure, small

On a GPU, at SD3.5-Medium's size, with random weights (16 GB on disk; written once, for all that follows):
    python benchmarks/models.py full /tmp/full
    # a whole rollout of the published recipe, 1,152 images at 9 times each: phases, peak memory, utilisation
    python benchmarks/step.py --model /tmp/full --name full --alone --warm-up 0 --rounds 1
    # against the reference, on half of what each of its eight GPUs has of a rollout: ratios
    python benchmarks/step.py --model /tmp/full --name full-ratio --rounds 2 rollout.prompts=3
    # on a card of 24 GB: peak memory; flowtilt alone, since the reference's fp32 base leaves no room
    python benchmarks/step.py --model /tmp/full --name full-24 --memory-cap 24 --rounds 1 rollout.prompts=3
    # the same with activations recomputed
    python benchmarks/step.py --model /tmp/full --name full-recomputed --alone --rounds 2 rollout.prompts=3 model.recompute=true

Models with random weights run sd35m-geneval with the playground's prompts and the mean brightness as a reward, in place of the
GenEval detector's weights; any key of the recipe can be overridden, `rewards={geneval=1.0} prompts=geneval-train` among them.
The plain loop (benchmarks/plain.py) is given the same network, noise and numbers in the first round, and the LoRA weights after
it are compared, so that a difference in speed is not one in maths. While one side works, the other's network waits on the CPU.
"""

import argparse
import json
import math
import os
import platform
import statistics
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")

import torch
from clocks import Watch, begin_memory, cap_memory, clock_name, needed_operations, now, peak_memory, peak_rate, timed_step
from models import SCALES, write
from plain import PlainLoop

from flowtilt import Trainer, load_recipe
from flowtilt.device.placement import SMALL as SMALL_GPU
from flowtilt.io.environment import processor
from flowtilt.plan.memory import GIB
from flowtilt.playground import pipeline_path

COMMON = ["evaluate.every=0", "evaluate.images=1", "guards=off"]
RECIPES: dict[str, tuple[str, list[str], list[int]]] = {
    "playground": ("playground", ["objective.kl=1e-4"], [9, 18, 36, 72, 144]),
    "small": (
        "sd35m-geneval",
        ["model.resolution=128", "rollout.prompts=6", "rollout.images_per_prompt=6", "rollout.steps=5", "objective.times_per_image=4"],
        [9, 36],
    ),
    "full": ("sd35m-geneval", [], [9, 18, 36]),
}
"""Recipe, overrides and the plain loop's micro-batches of a model; the first is what the reference takes on every GPU."""
AGREE = 0.02
"""Greatest difference of the LoRA weights after a step on an fp32 base, relative to how far they moved; Adam magnifies roundings
where a gradient is nearly zero."""


def stand_ins(folder: Path) -> list[str]:
    """What a recipe of SD3.5-Medium takes for a model of random weights: a reward and prompts that cost nothing."""
    reward = f"rewards={{brightness='{Path(__file__).parent}/models.py:brightness'}}"
    prompts = ["prompts=playground", "evaluate.prompts=playground"]
    return [f"model.path={folder}", reward, *prompts, "evaluate.rewards=['brightness']"]


class Bench:
    """Both sides, and what was measured of them."""

    def __init__(self, args: argparse.Namespace, model: str, folder: Path, run: Path):
        recipe, overrides, sizes = RECIPES[model]
        overrides = [*COMMON, *overrides, f"run={run}"]
        if model != "playground":
            overrides += stand_ins(folder)
        if args.memory_cap:
            cap_memory(args.memory_cap)
            overrides.append(f"model.offload={str(args.memory_cap * GIB < SMALL_GPU).lower()}")
        self.trainer = Trainer(load_recipe(recipe, [*overrides, *args.overrides]))
        # the old policy gets its own pass from the first step on, as in all others
        self.trainer.policy.changed()
        self.device, self.network = self.trainer.policy.model.device, self.trainer.policy.model.network
        self.operations = needed_operations(self.trainer)
        self.begun = [p.detach().clone() for p in self.trainer.policy.parameters]
        self.sizes = [] if args.memory_cap else sizes if args.sizes is None else args.sizes
        self.plain = PlainLoop(self.trainer, str(folder)) if self.sizes else None
        if self.plain:
            self.plain.network.to("cpu")
            self.network.to("cpu")
        self.turns: dict[str, list[dict[str, Any]]] = {"flowtilt": [], **{f"plain {size}": [] for size in self.sizes}}
        self.difference: float | None = None

    def round(self, number: int, measured: bool, compared: bool) -> None:
        """Every side's turn at rollout `number`."""
        took = {"flowtilt": self._flowtilt()}
        for k, size in enumerate(self.sizes):
            took[f"plain {size}"] = self._plain(number, size, compared and k == 0)
            if compared and k == 0 and took[f"plain {size}"]:
                self.difference = self._apart()
        said = (f"{name} {turn['seconds']:.2f} s" if turn else f"{name} out of memory" for name, turn in took.items())
        print(f"round {number}:", "  ".join(said), flush=True)
        self.sizes = [size for size in self.sizes if took[f"plain {size}"]]
        if measured:
            for name, turn in took.items():
                self.turns[name] += [turn] if turn else []

    def _flowtilt(self) -> dict[str, Any]:
        with self._alone(self.network), Watch(self.trainer) as watch:
            metrics, seconds = timed_step(self.trainer)
            peak = peak_memory(self.device)
        times = {name.removeprefix("time/"): value for name, value in metrics.items() if name.startswith("time/")}
        phases = {name: value / sum(times.values()) for name, value in times.items()}
        parts = {part: value / seconds for part, value in watch.seconds().items()} | {"rewards": phases["reward"]}
        return {"seconds": seconds, "phases": phases, "parts": parts | {"rest": 1 - sum(parts.values())}, "peak": peak}

    def _plain(self, number: int, size: int, same_noise: bool) -> dict[str, Any] | None:
        """None where it does not fit."""
        assert self.plain
        with self._alone(self.plain.network):
            begin = now(self.device)
            try:
                self.plain.step(number, size, same_noise)
                seconds = now(self.device) - begin
            except torch.OutOfMemoryError:
                return None
            return {"seconds": seconds, "peak": peak_memory(self.device)}

    @contextmanager
    def _alone(self, network: Any) -> Iterator[None]:
        network.to(self.device)
        begin_memory(self.device)
        try:
            yield
        finally:
            if self.plain:
                network.to("cpu")

    def _apart(self) -> float:
        """How far both sides' LoRA weights are from each other, relative to how far flowtilt's moved."""
        assert self.plain
        ours = [p.detach().cpu() for p in self.trainer.policy.parameters]
        apart = math.hypot(*(float((a.detach().cpu() - b).norm()) for a, b in zip(self.plain.current, ours, strict=True)))
        return apart / math.hypot(*(float((b - c.cpu()).norm()) for b, c in zip(ours, self.begun, strict=True)))

    def entries(self) -> list[dict[str, Any]]:
        """One for each side."""
        operations, rate = self.operations, peak_rate()
        ours, found = self.turns["flowtilt"], []
        for name, turns in self.turns.items():
            seconds = [turn["seconds"] for turn in turns]
            if len(turns) < len(ours):
                found.append({"method": name, "seconds": None, "why": "out of memory"})
                continue
            ratios = sorted(s / turn["seconds"] for s, turn in zip(seconds, ours, strict=True))
            entry = {"method": name, "seconds": seconds, "median": statistics.median(seconds), "ratio": statistics.median(ratios)}
            entry |= {"ratio_range": [ratios[0], ratios[-1]], "peak_gib": turns[-1]["peak"]}
            entry["utilisation"] = rate and sum(operations.values()) / entry["median"] / rate
            found.append(entry)
        found[0] |= {
            **{
                what: {name: statistics.median(turn[what][name] for turn in ours) for name in ours[0][what]} for what in ("phases", "parts")
            },
            "utilisation_by_phase": rate
            and {
                name: count / statistics.median(turn["phases"][name] * turn["seconds"] for turn in ours) / rate
                for name, count in operations.items()
            },
            "needed_operations": operations,
            "micro_batch": {kind: self.trainer.micro_batch.size(kind) for kind in ("sample", "decode", "train")},
            "recomputed": self.trainer.policy.recomputes,
            "relative_weight_difference_after_one_step": self.difference,
        }
        return found

    def _base(self) -> str:
        return str(self.network.dtype).removeprefix("torch.")

    def facts(self) -> dict[str, Any]:
        """What was measured, on what."""
        recipe = self.trainer.recipe
        r = recipe.rollout
        return {
            "seed": recipe.seed,
            "geometry": {
                "images": [r.prompts, r.images_per_prompt],
                "solver": [r.solver, r.steps],
                "times": recipe.objective.times_per_image,
                "resolution": self.trainer.policy.model.protocol["resolution"],
            },
            "reward": ", ".join(recipe.rewards),
            "clock": clock_name(),
            "base": self._base(),
            "plain base": "float32" if self._base() == "float32" else f"float32, autocast to {self._base()}",
            "machine": machine(self.device),
            "command": "python " + " ".join(["benchmarks/step.py", *sys.argv[1:]]),
        }


def machine(device: torch.device) -> str:
    """The device's name and the versions that matter."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{processor()}, {torch.get_num_threads()} threads"
    return f"{name}, torch {torch.__version__}, Python {platform.python_version()}"


def _shares(values: dict[str, float]) -> str:
    return ", ".join(f"{name} {share:.1%}" for name, share in values.items())


def report(entries: list[dict[str, Any]]) -> None:
    """What was measured, for people."""
    for entry in entries:
        if entry["seconds"] is None:
            print(f"{entry['method']:12} {entry['why']}")
            continue
        low, high = entry["ratio_range"]
        peak, used = entry["peak_gib"], entry["utilisation"]
        print(
            f"{entry['method']:12} median {entry['median']:.2f} s   {entry['ratio']:.2f} x flowtilt ({low:.2f} to {high:.2f})",
            f"peak {peak['tensors']:.1f} GiB of tensors, {peak['taken']:.1f} taken" if peak else "peak n/a",
            f"utilisation {used:.1%}" if used else "utilisation n/a",
            sep="   ",
        )
    ours = entries[0]
    print("share of a step by phase:", _shares(ours["phases"]))
    print("share of a step by part: ", _shares(ours["parts"]))
    if ours["utilisation_by_phase"]:
        print("utilisation:", _shares(ours["utilisation_by_phase"]))
    print("micro-batch:", ", ".join(f"{kind} {size}" for kind, size in ours["micro_batch"].items()))


def _numbers(text: str) -> list[int]:
    return [int(number) for number in text.split(",")]


def main(words: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="playground", help="playground, small, full, or a folder that models.py wrote (%(default)s)")
    parser.add_argument(
        "--name", help="under which figures are kept in the results, where older ones of that name go; none takes the model"
    )
    parser.add_argument("--rounds", type=int, default=5, help="measured ones (%(default)s)")
    parser.add_argument("--warm-up", type=int, default=1, help="rounds before them, the first of which compares (%(default)s)")
    parser.add_argument("--sizes", type=_numbers, metavar="N,N,…", help="micro-batches of the plain loop")
    parser.add_argument("--alone", action="store_const", const=[], dest="sizes", help="no plain loop")
    parser.add_argument("--memory-cap", type=float, metavar="GIB", help="flowtilt alone, as on a GPU of so much memory")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results" / "step.json")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="of the recipe")
    args = parser.parse_intermixed_args(words)
    if args.memory_cap and not torch.cuda.is_available():
        parser.error("--memory-cap needs a GPU")
    with tempfile.TemporaryDirectory() as temporary:
        os.environ["XDG_CACHE_HOME"] = temporary  # or captions that an earlier command left there would be read, not encoded
        folder, model = Path(args.model), args.model if args.model in RECIPES else "full"
        if args.model in SCALES:
            write(args.model, folder := Path(temporary) / "model")
        elif args.model == "playground":
            folder = pipeline_path()
        bench = Bench(args, model, folder, Path(temporary) / "run")
        for number in range(1, args.warm_up + args.rounds + 1):
            bench.round(number, number > args.warm_up, compared=args.warm_up > 0 and number == 1)
    entries, facts = bench.entries(), bench.facts()
    report(entries)
    if bench.difference is not None:
        print(f"LoRA weights after one step differ by {bench.difference:.1e} of how far they moved")
        if facts["base"] == "float32" and not bench.difference < AGREE:
            sys.exit(f"step.py: that is more than {AGREE}: both sides do not compute the same, and nothing is kept")
    keep(args.output, args.name or args.model, [{**entry, **facts} for entry in entries])


def keep(output: Path, name: str, entries: list[dict[str, Any]]) -> None:
    """Puts entries into the results in place of those of the same name."""
    before = json.loads(output.read_text()) if output.exists() else []
    others = [entry for entry in before if entry["run"] != name]
    output.write_text(json.dumps([*others, *({"run": name, **entry} for entry in entries)], indent=1) + "\n")


if __name__ == "__main__":
    main()
