"""Requests of many clients, scored together by one thread."""

import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field

import torch
from torch import Tensor

from flowtilt.errors import UserError
from flowtilt.prompts import Prompt
from flowtilt.rewards import Reward, RewardOutput, score

Measured = Callable[[str, int, float], None]
"""Told of every call of a reward: its name, images, seconds."""


@dataclass
class Job:
    """At least one image [3, H, W], sizes may differ; `future` gets its RewardOutput."""

    images: Sequence[Tensor]
    prompts: Sequence[Prompt]
    future: Future[RewardOutput] = field(default_factory=Future)
    arrived: float = field(default_factory=time.monotonic)


class Batcher:
    """One thread calls the rewards, so that models need no locks.

    The reward whose request has waited longest is next. Requests for it are joined, in order, up to
    `max_batch` images. Where joined requests fail, each is tried alone, so that an error reaches only the
    request that causes it.

    Args:
        max_batch: images of one call.
        linger: seconds that a request waits for company while nothing else is done.
    """

    def __init__(self, rewards: Mapping[str, Reward], *, max_batch: int, linger: float, measured: Measured):
        self._rewards, self._max_batch, self._linger, self._measured = rewards, max_batch, linger, measured
        self._jobs: dict[str, deque[Job]] = {name: deque() for name in rewards}
        self._changed = threading.Condition()
        self._closing = False
        self._thread = threading.Thread(target=self._run, name="rewards", daemon=True)
        self._thread.start()

    def submit(self, reward: str, images: Sequence[Tensor], prompts: Sequence[Prompt]) -> Future[RewardOutput]:
        """The scores to be; its exception is the reward's. A future that is cancelled in time costs nothing."""
        job = Job(images, prompts)
        with self._changed:
            if self._closing:
                raise RuntimeError("the batcher is closed")
            self._jobs[reward].append(job)
            self._changed.notify()
        return job.future

    @property
    def queued(self) -> int:
        """Images whose batch has not begun."""
        with self._changed:
            return sum(len(job.images) for jobs in self._jobs.values() for job in jobs)

    def close(self) -> None:
        """Finishes what was submitted."""
        with self._changed:
            self._closing = True
            self._changed.notify()
        self._thread.join()

    def _run(self) -> None:
        while taken := self._take():
            name, jobs = taken
            running = [job for job in jobs if job.future.set_running_or_notify_cancel()]
            if running:
                self._settle(name, running)

    def _take(self) -> tuple[str, list[Job]] | None:
        with self._changed:
            while not any(self._jobs.values()):
                if self._closing:
                    return None
                self._changed.wait()
            name = min((n for n, jobs in self._jobs.items() if jobs), key=lambda n: self._jobs[n][0].arrived)
            jobs = self._jobs[name]
            while not self._closing and self._fitting(jobs) == len(jobs):
                left = jobs[0].arrived + self._linger - time.monotonic()
                if left <= 0:
                    break
                self._changed.wait(left)
            return name, [jobs.popleft() for _ in range(self._fitting(jobs))]

    def _fitting(self, jobs: deque[Job]) -> int:
        """How many of the first jobs make a batch: at least one, together at most `max_batch` images."""
        images = 0
        for number, job in enumerate(jobs):
            images += len(job.images)
            if images > self._max_batch:
                return max(number, 1)
        return len(jobs)

    def _settle(self, name: str, jobs: list[Job]) -> None:
        try:
            output = self._judge(name, [i for job in jobs for i in job.images], [p for job in jobs for p in job.prompts])
        except BaseException as error:  # nobody above a thread would catch it, and its clients would wait forever
            if len(jobs) == 1:
                jobs[0].future.set_exception(error if isinstance(error, Exception) else UserError(f"{type(error).__name__}: {error}"))
            else:
                for job in jobs:
                    self._settle(name, [job])
            return
        start = 0
        for job in jobs:
            rows = slice(start, start + len(job.images))
            details = {key: values[rows] for key, values in output.details.items()}
            job.future.set_result(RewardOutput(output.scores[rows], output.notes[rows], details))
            start = rows.stop

    def _judge(self, name: str, images: list[Tensor], prompts: list[Prompt]) -> RewardOutput:
        columns: dict[str, Tensor] = {}
        notes = [""] * len(images)
        sizes: dict[torch.Size, list[int]] = {}
        for i, image in enumerate(images):
            sizes.setdefault(image.shape, []).append(i)
        for same in sizes.values():
            for start in range(0, len(same), self._max_batch):
                rows = same[start : start + self._max_batch]
                began = time.perf_counter()
                scores, said = score({name: self._rewards[name]}, torch.stack([images[i] for i in rows]), [prompts[i] for i in rows])
                self._measured(name, len(rows), time.perf_counter() - began)
                for column, values in scores.items():
                    columns.setdefault(column, torch.full((len(images),), torch.nan))[rows] = values
                for i, note in zip(rows, said, strict=True):
                    notes[i] = note
        scores = columns.pop(name)
        return RewardOutput(scores, notes, {column.removeprefix(f"{name}/"): values for column, values in columns.items()})
