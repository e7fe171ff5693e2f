"""Runs up to a budget of network evaluations, several at a time, each in a process with one thread.

A run is a folder. What is finished is skipped, what was interrupted goes on from its checkpoint to the same bits.
"""

import json
import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

from contest.settings import Amount
from flowtilt.config import Recipe, load_recipe
from flowtilt.io.files import read_lines, renamed

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["flowtilt.training.trainer"])
INTERRUPTED = 130


@dataclass(frozen=True)
class Job:
    """A run.

    Args:
        folder: of the run.
        recipe: a recipe of the package.
        overrides: of it.
        budget: network evaluations, of which at most one rollout's worth is left over.
        amount: of what is measured afterwards; none measures nothing.
    """

    folder: Path
    recipe: str
    overrides: tuple[str, ...]
    budget: int
    amount: Amount | None = None

    @property
    def name(self) -> str:
        return str(Path(*self.folder.parts[-2:]))

    def load(self, steps: int = 1) -> Recipe:
        return load_recipe(self.recipe, [*self.overrides, f"rollouts={steps}", f"run={self.folder}"])

    def line(self) -> str:
        """What tells it from all other runs."""
        return " ".join(["flowtilt train", self.recipe, *self.overrides])

    def command(self) -> str:
        """What repeats it, once it is finished."""
        return f"{self.line()} rollouts={self._rollouts()}"

    def _rollouts(self) -> int:
        return max((record["rollout"] for record in read_lines(self.folder / "metrics.jsonl")), default=0)

    def spent(self) -> int:
        """Network evaluations so far."""
        return max((record["network_evaluations"] for record in read_lines(self.folder / "metrics.jsonl")), default=0)

    def finished(self) -> bool:
        """Whether the budget is spent, the last rollout evaluated, and everything measured."""
        summary = self.folder / "summary.json"
        if not summary.is_file() or (self.amount and not (self.folder / "measures.json").is_file()):
            return False
        rollouts = self._rollouts()
        ended = renamed(json.loads(summary.read_text()))["rollouts"] == rollouts
        return ended and not more_rollouts(self.load(), rollouts, self.budget - self.spent())


def more_rollouts(recipe: Recipe, done: int, budget: int) -> int:
    """How many rollouts after `done` fit into a budget, each at its full price.

    FlowGRPO pays less where groups score alike and are left out: what it has saved by the end is asked for once more.
    """
    from flowtilt.plan.passes import passes_of

    number = 0
    while (budget := budget - passes_of(recipe, done + number + 1).evaluations) >= 0:
        number += 1
    return number


def work(job: Job) -> None:
    """Trains, then measures; the body of a process. Its output is beside the run, in a file that ends in .log."""
    job.folder.parent.mkdir(parents=True, exist_ok=True)
    log = os.open(job.folder.with_name(f"{job.folder.name}.log"), os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    if not _train(job):
        sys.exit(INTERRUPTED)
    if job.amount:
        from contest.measures import measure

        measure(job.folder, job.amount)


def _train(job: Job) -> bool:
    """Trains until no rollout fits into the budget any more; false when interrupted."""
    import torch

    from flowtilt import Trainer
    from flowtilt.runs.folder import open_run

    torch.set_num_threads(1)
    while True:
        resume = job.folder if (job.folder / "recipe.toml").is_file() else None
        recipe = open_run(job.folder, []) if resume else job.load(more_rollouts(job.load(), 0, job.budget))
        done = job._rollouts()
        if resume and _summed_up(job.folder) == done == recipe.rollouts:
            more = more_rollouts(recipe, done, job.budget - job.spent())
            if not more:
                return True
            recipe = open_run(job.folder, [f"rollouts={done + more}"])
        trainer = Trainer(recipe, resume=resume)

        def interrupt(number: int, frame: object, trainer: Trainer = trainer) -> None:
            trainer.interrupted = True

        signal.signal(signal.SIGINT, interrupt)
        signal.signal(signal.SIGTERM, interrupt)
        if trainer.run() is None:
            return False


def _summed_up(folder: Path) -> int | None:
    path = folder / "summary.json"
    return renamed(json.loads(path.read_text()))["rollouts"] if path.is_file() else None


def run_all(jobs: Sequence[Job], workers: int, say: Callable[[str], None], seconds: Callable[[Job], float]) -> None:
    """Brings every job to its end, in order, `workers` at a time.

    Args:
        say: told in a line what is done and what is left.
        seconds: what a job is expected to take on a core of its own.

    Raises:
        SystemExit: runs failed, once all others are done.
        KeyboardInterrupt: after every run has saved.
    """
    left = [job for job in jobs if not job.finished()]
    if len(left) < len(jobs):
        say(f"{len(jobs) - len(left)} of {len(jobs)} runs are there already")
    begun, number = time.monotonic(), len(left)
    ahead = {job: seconds(job) for job in left}
    whole = sum(ahead.values())
    failed: list[Job] = []
    live: dict[int, tuple[Job, Any]] = {}
    try:
        while left or live:
            while left and len(live) < workers:
                job = left.pop(0)
                process = CONTEXT.Process(target=work, args=(job,))
                process.start()
                live[process.sentinel] = (job, process)
            for sentinel in [found for found in wait(list(live)) if isinstance(found, int)]:
                job, process = live.pop(sentinel)
                process.join()
                if process.exitcode:
                    failed.append(job)
                    say(f"{job.name} failed, see {job.folder.name}.log in {job.folder.parent}")
                del ahead[job]
                more = sum(ahead.values())
                minutes = (time.monotonic() - begun) / (whole - more) * more / 60
                say(f"{number - len(ahead)} of {number}: {job.name}" + (f"; about {minutes:.0f} min left" if ahead else ""))
    except KeyboardInterrupt:
        for _, process in live.values():
            os.kill(process.pid or 0, signal.SIGINT)
        for _, process in live.values():
            process.join()
        raise
    if failed:
        raise SystemExit(f"{len(failed)} of {len(jobs)} runs failed; the same command tries them again")
