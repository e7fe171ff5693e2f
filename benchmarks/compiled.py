"""What `model.compile` gains and what it changes, on one GPU: seconds of a pass and of a rollout, its kernels, its roundings.

    python benchmarks/models.py lean /tmp/lean               # SD3.5-Medium but for T5's depth, random weights, 7 GB
    python benchmarks/compiled.py --model /tmp/lean          # sd35m-geneval, a prompt's 18 images, in micro-batches of 18

Everything is measured before and after compiling, in one process, on the same noise. Velocities of equal weights are compared
between both, and between a pass that is recorded for a backward and one that is not: FlowGRPO's ratio compares those two, so
|ratio - 1| of equal weights is given, too, to be held against `objective.clip_range`.
"""

import argparse
import json
import statistics
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from clocks import begin_memory, needed_operations, now, peak_memory, peak_rate, timed_step
from step import COMMON, machine, stand_ins
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from flowtilt import Trainer, load_recipe
from flowtilt.policy.compiling import compile_blocks
from flowtilt.seeding import noise
from flowtilt.solvers import log_prob, sde_step

KINDS = {"products": ("nvjet", "gemm", "cutlass", "xmma"), "attention": ("sdpa", "flash", "cudnn::fusion")}
"""Parts of the names of a GPU's kernels, matrix products first; all others move numbers about or change them one by one."""
ETA = 0.7
"""Of FlowGRPO's published recipes."""


class Passes:
    """The two kinds of pass over the same rows of noise."""

    def __init__(self, trainer: Trainer, rows: int):
        self.policy, model = trainer.policy, trainer.policy.model
        self.x = noise(0, "compiled", [(k,) for k in range(rows)], model.latent_shape).to(model.device)
        self.t = torch.linspace(0.05, 0.95, rows, device=model.device)
        self.given = model.encode(["a red circle"] * rows)
        self.levels = model.levels(trainer.recipe.rollout.steps).to(model.device)

    def forward(self, role: str = "old") -> Tensor:
        with torch.no_grad():
            return self.policy.velocity(role, self.x, self.t, self.given)

    def train(self) -> Tensor:
        v = self.policy.velocity("current", self.x, self.t, self.given)
        v.square().mean().backward()
        return v.detach()

    def ratio_deviation(self, v: Tensor, other: Tensor, step: int) -> float:
        """Mean |ratio - 1| of Flow-SDE's step drawn with one velocity and weighed with the other."""
        s, s_next, first = self.levels[step], self.levels[step + 1], self.levels[1]
        z = noise(1, "compiled", [(k,) for k in range(len(v))], v.shape[1:]).to(v.device)
        x_next, mean, std = sde_step(self.x, v, s, s_next, z, "flow", ETA, first)
        _, moved, _ = sde_step(self.x, other, s, s_next, torch.zeros_like(z), "flow", ETA, first)
        return float((log_prob(x_next, moved, std) - log_prob(x_next, mean, std)).exp().sub(1).abs().mean())


def seconds(work: Callable[[], Any], device: torch.device, times: int = 5) -> float:
    """Median, after one that is not counted."""
    work()
    took = []
    for _ in range(times):
        begin = now(device)
        work()
        took.append(now(device) - begin)
    return statistics.median(took)


def kernels(work: Callable[[], Any], device: torch.device) -> dict[str, float] | None:
    """Milliseconds of a GPU by kind of kernel; none on a CPU."""
    if device.type != "cuda":
        return None
    with profile(activities=[ProfilerActivity.CUDA]) as seen:
        work()
        now(device)
    found = dict.fromkeys([*KINDS, "others"], 0.0)
    for event in seen.events() or []:
        kind = next((kind for kind, parts in KINDS.items() if any(part in event.name for part in parts)), "others")
        found[kind] += event.device_time / 1000
    return found


def measure(trainer: Trainer, passes: Passes) -> dict[str, Any]:
    """Of the network as it is now."""
    device, images = passes.x.device, trainer.recipe.rollout.images_per_prompt
    found: dict[str, Any] = {
        "forward_seconds": seconds(passes.forward, device),
        "training_seconds": seconds(passes.train, device, 3),
        "forward_kernels_ms": kernels(passes.forward, device),
        "training_kernels_ms": kernels(passes.train, device),
    }
    trainer._step()
    begin_memory(device)
    metrics, took = timed_step(trainer)
    found |= {"rollout_seconds": took, "images": images, "peak_gib": peak_memory(device)}
    rate, operations = peak_rate(), needed_operations(trainer)
    return found | {"utilisation": rate and {phase: operations[phase] / metrics[f"time/{phase}"] / rate for phase in operations}}


def off(a: Tensor, b: Tensor) -> float:
    return float((a - b).norm() / b.norm())


def velocities(passes: Passes, plain: Tensor | None) -> dict[str, Any]:
    """How far passes of equal weights are apart; all LoRAs are still at their beginning, where they change nothing."""
    v, recorded, bare = passes.forward(), passes.train(), passes.forward("reference")
    last = len(passes.levels) - 3  # the step after it is drawn without noise
    return {
        "recorded": off(recorded, v),
        "reference": off(bare, v),
        "not_compiled": None if plain is None else off(v, plain),
        "ratio_off": {step: passes.ratio_deviation(v, recorded, step) for step in (1, last // 2 + 1, last)},
    }


def main(words: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, required=True, help="a folder that models.py wrote")
    parser.add_argument("--rows", type=int, default=18, help="images, and the micro-batch (%(default)s)")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results" / "compiled.json")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="of sd35m-geneval")
    args = parser.parse_intermixed_args(words)
    group = ["rollout.prompts=1", f"rollout.images_per_prompt={args.rows}", f"micro_batch={args.rows}"]
    with tempfile.TemporaryDirectory() as temporary:
        recipe = load_recipe("sd35m-geneval", [*COMMON, *stand_ins(args.model), *group, *args.overrides, f"run={temporary}/run"])
        trainer = Trainer(recipe)
        passes = Passes(trainer, args.rows)
        begun = trainer.policy.state("current")
        plain = passes.forward()
        found: dict[str, Any] = {"plain": {"velocities": velocities(passes, None)} | measure(trainer, passes)}
        for role in ("current", "old"):
            trainer.policy.load_state(role, begun)
        begin = now(passes.x.device)
        if why := compile_blocks(trainer.policy):
            sys.exit(f"compiled.py: {why}")
        took = now(passes.x.device) - begin
        found["compiled"] = {"compiling_seconds": took, "velocities": velocities(passes, plain)} | measure(trainer, passes)
    found |= {"machine": machine(passes.x.device), "command": "python " + " ".join(["benchmarks/compiled.py", *sys.argv[1:]])}
    text = json.dumps(found, indent=1) + "\n"
    print(text)
    args.output.write_text(text)


if __name__ == "__main__":
    main()
