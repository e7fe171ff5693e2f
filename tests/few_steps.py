"""RTDMD's two recipes of the playground, cut down to a second, and what the tests of both ask of a trainer."""

import json
import shutil

from conftest import LIGHT, two_blocks

from flowtilt import Trainer
from flowtilt.config import load_recipe
from flowtilt.io.files import read_lines
from flowtilt.runs import checkpoint
from flowtilt.runs.folder import open_run
from flowtilt.training.optimizer import RoleOptimizer

TINY = ["evaluate.every=0", "evaluate.images=2", "evaluate.samples=1", "checkpoint.every=1"]
COLD = [*TINY, "rollouts=2", "rollout.prompts=5", "objective.consistency=0.01"]
RL = [*TINY, "rollouts=2", "rollout.prompts=3", "rollout.images_per_prompt=4"]


def cold(run, *overrides):
    """Distillation: 5 samples a batch, which 4 steps do not divide."""
    return load_recipe("playground-rtdmd-cold", [*COLD, two_blocks(), f"run={run}", *overrides])


def rl(run, on, *overrides):
    """Reinforcement of 3 prompts x 4 images on what `cold` has left."""
    return load_recipe("playground-rtdmd-rl", [*RL, two_blocks(), *LIGHT, f"run={run}", f"lora.on={json.dumps([str(on)])}", *overrides])


def going_on(run, folder, *overrides):
    """A trainer that goes on with a copy of a run."""
    shutil.copytree(run, folder)
    return Trainer(open_run(folder, ["rollouts=99", *overrides]), resume=folder)


def kept(run):
    """All that a run computed: tensors of all roles and optimizers as bytes, and metrics without clocks."""
    last = checkpoint.newest(run)
    assert last
    tensors = {f"{file}.{name}": value.numpy().tobytes() for file, found in last.tensors.items() for name, value in found.items()}
    metrics = [{k: v for k, v in one.items() if "second" not in k and "time/" not in k} for one in read_lines(run / "metrics.jsonl")]
    return last.step, last.state["optimizer_steps"], tensors, metrics


def recorded(monkeypatch):
    """Updates are not made: of each is kept whose it is, the gradient by its parts, and the sums."""
    found = []

    def step(self, sums, phases):
        found.append((self._role, [w.grad.clone() for w in self.weights], {name: float(value) for name, value in sums.items()}))
        return 0.0

    monkeypatch.setattr(RoleOptimizer, "step", step)
    return found


def largest(gradients):
    return max(float(g.abs().max()) for g in gradients)
