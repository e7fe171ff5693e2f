"""What several test files share: a recipe that trains in seconds, and runs of it."""

import os

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")

import copy
import gc
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from flowtilt.config import Recipe, load_recipe

QUICK = [
    "steps=4",
    "rollout.prompts=3",
    "rollout.images_per_prompt=4",
    "rollout.steps=4",
    "objective.times_per_image=2",
    "optimizer.steps_per_rollout=2",
    "evaluate.every=2",
    "evaluate.images=8",
    "evaluate.steps=2",
    "evaluate.samples=4",
    "checkpoint.every=1",
]


TOGETHER = {
    "plan": ("test_plan", "test_plan_memory", "test_plan_network"),
    "forked": (
        "test_cli",
        "test_distributed",
        "test_evaluate_images",
        "test_head_to_head",
        "test_lifeline",
        "test_resume",
        "test_sharding",
    ),
}
"""Modules that one worker runs: what the first has measured, or imported to fork from, takes many seconds once."""


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Workers take whole modules, so that what a module shares is made once, and all modules of a group."""
    from xdist.scheduler import LoadScopeScheduling

    class ByGroup(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            module = nodeid.partition("::")[0]
            return next((group for group, modules in TOGETHER.items() if Path(module).stem in modules), module)

    return ByGroup(config, log)


def pytest_collection_finish() -> None:
    """What is imported by now stays: the collector need not walk over its million objects again and again."""
    gc.collect()
    gc.freeze()


def quick(run: Path, *overrides: str) -> Recipe:
    """The playground recipe, cut down to a few seconds."""
    return load_recipe("playground", [*QUICK, f"run={run}", *overrides])


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a short run that has ended; tests only read it."""
    from flowtilt import Trainer

    folder = tmp_path_factory.mktemp("runs") / "finished"
    Trainer(quick(folder)).run()
    return folder


@pytest.fixture(scope="session", autouse=True)
def _read_once():
    """A worker reads the playground once: each test has a network of its own, beside text encoders and a VAE that nobody trains."""
    from flowtilt.models import opening
    from flowtilt.playground import pipeline_path

    library, read = opening.DiffusionPipeline, {}

    def from_pretrained(place: str, **how: Any) -> Any:
        if place != str(pipeline_path()):
            return library.from_pretrained(place, **how)
        key = tuple(sorted(how.items(), key=str))
        if key not in read:
            read[key] = library.from_pretrained(place, **how)
        pipeline = copy.copy(read[key])
        own = {name: copy.deepcopy(getattr(pipeline, name)) for name in ("transformer", "scheduler")}
        pipeline.register_modules(**own)
        return pipeline

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(opening, "DiffusionPipeline", SimpleNamespace(load_config=library.load_config, from_pretrained=from_pretrained))
        yield


@pytest.fixture(autouse=True)
def _no_power_cut(monkeypatch: pytest.MonkeyPatch):
    """Tests end processes, never the machine: what waits for the disk takes a tenth of a small run's time and changes nothing."""
    monkeypatch.setattr(os, "fsync", lambda file: None)


@pytest.fixture(autouse=True)
def _one_thread_count():
    """Bits depend on the number of threads: every test, on whichever worker, computes with one."""
    torch.set_num_threads(1)
