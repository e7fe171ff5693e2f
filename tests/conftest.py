"""What several test files share: a recipe that trains in seconds, and runs of it.

Imports are in the functions that need them: the process that hands out the tests needs none, and workers wait for it.
"""

import os

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")

import gc
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from flowtilt.config import Recipe

gc.disable()  # until all is imported: among a million objects that stay, the collector finds nothing to free

QUICK = [
    "rollouts=2",
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
LONGER = ["rollouts=4"]
"""For tests that look at more than two rollouts; `finished` has as many."""

TOGETHER = {
    "plan": ("test_plan", "test_plan_memory", "test_plan_network"),
    "few steps": ("test_distil", "test_hybrid"),
    "forked": (
        "test_cli",
        "test_distributed",
        "test_evaluate_images",
        "test_head_to_head",
        "test_lifeline",
        "test_marble",
        "test_resume",
        "test_served",
        "test_sharding",
        "test_signals",
    ),
}
"""Modules that one worker runs: what the first has measured, or imported to fork from, takes many seconds once."""

LONG = ("test_compiling", "test_guards_in_training", "test_published_recipes", "test_trainer", "test_verify", "test_wheel")
"""Then these; what is short comes last, so that both workers end together."""


def _group(nodeid: str) -> str | None:
    module = Path(nodeid.partition("::")[0]).stem
    return next((group for group, modules in TOGETHER.items() if module in modules), None)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What takes longest begins first, so that no worker is left with it in the end."""
    items.sort(key=lambda item: (_group(item.nodeid) is None, item.path.stem not in LONG))


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Workers take whole modules, so that what a module shares is made once, and all modules of a group."""
    from xdist.scheduler import LoadScopeScheduling

    class ByGroup(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            return _group(nodeid) or nodeid.partition("::")[0]

    return ByGroup(config, log)


def pytest_collection_finish() -> None:
    """What is imported by now stays: the collector need not walk over its million objects again and again."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(10_000, 20, 20)  # tests make many small objects, and few cycles
    gc.enable()


LIGHT = [f"rewards.light={Path(__file__).parent}/shallow.py:light", 'evaluate.rewards=["light","playground_strict"]']
"""Beside the playground's own reward, which finds nothing drawn by half of a network."""


def two_blocks() -> str:
    """Half of the playground's network, which is enough for most tests."""
    return f"model.path={os.environ['SHALLOW']}"


def quick(run: Path, *overrides: str, whole: bool = False) -> "Recipe":
    """The playground recipe, cut down to a second.

    Args:
        whole: for tests of what the playground has learnt; others have half of its network, and `LIGHT` unless they say
            themselves what is rewarded.
    """
    from flowtilt.config import load_recipe

    half = [two_blocks(), *([] if "rewards.playground=0" in overrides else LIGHT)]
    another = any(word.startswith("objective.type=") for word in overrides)
    short = [word for word in QUICK if not (another and word.startswith("objective."))]
    return load_recipe("playground", [*short, *([] if whole else half), f"run={run}", *overrides])


def _ended(place: Path, whole: bool) -> Path:
    from flowtilt import Trainer

    Trainer(quick(place / "finished", *LONGER, whole=whole)).run()
    return place / "finished"


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a short run that has ended; tests only read it."""
    return _ended(tmp_path_factory.mktemp("runs"), whole=False)


@pytest.fixture(scope="session")
def learnt(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same of the whole playground."""
    return _ended(tmp_path_factory.mktemp("learnt"), whole=True)


@pytest.fixture
def unread(monkeypatch: pytest.MonkeyPatch) -> None:
    """For tests that measure what reading a caption takes."""
    import reading

    monkeypatch.setattr(reading, "encoded", {})


def no_fsync(file: int) -> None:
    """Tests end processes, never the machine: what waits for the disk takes a tenth of a small run's time and changes nothing."""


@pytest.fixture(scope="session")
def distilled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a distillation of two steps; tests only read it."""
    from few_steps import cold

    from flowtilt import Trainer

    folder = tmp_path_factory.mktemp("runs") / "cold"
    Trainer(cold(folder)).run()
    return folder


@pytest.fixture(scope="session", autouse=True)
def _alike_and_quick(tmp_path_factory: pytest.TempPathFactory):
    import shallow
    import torch
    from reading import read_once

    torch.set_num_threads(1)  # for what tests share
    os.environ["SHALLOW"] = str(tmp_path_factory.mktemp("models") / "shallow")  # for forked processes too
    shallow.write(Path(os.environ["SHALLOW"]))
    for own in ("TRUSTED", "CAPTIONS"):  # not the user's caches, where another version's captions may lie
        os.environ[f"FLOWTILT_{own}"] = str(tmp_path_factory.mktemp(own.lower()))
    with read_once(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", no_fsync)
        if ranks := sys.modules.get("ranks"):
            ranks.fork_from_here()  # while no test has left a thread or a patch behind
        yield


@pytest.fixture(autouse=True)
def _one_thread_count():
    """Bits depend on the number of threads: every test, on whichever worker, computes with one."""
    import torch

    torch.set_num_threads(1)
