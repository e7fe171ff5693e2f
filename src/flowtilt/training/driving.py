"""How a run is driven: to its end, or rollout by rollout; what is saved when, and what an interrupt does."""

import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Self

from flowtilt.config import Recipe
from flowtilt.config.held_out import score_name_of
from flowtilt.config.renamed import hint
from flowtilt.distributed import signals
from flowtilt.distributed.world import World
from flowtilt.errors import UserError
from flowtilt.io.files import write_json
from flowtilt.io.run_folder import RunFolder
from flowtilt.io.user_errors import describe_error
from flowtilt.methods.base import Method
from flowtilt.runs import folder as runs
from flowtilt.runs import tracking
from flowtilt.runs.shared import HeldRun
from flowtilt.training.display import Display
from flowtilt.training.live_page import LivePage
from flowtilt.training.preview import Preview
from flowtilt.training.state import Clock

OnRollout = Callable[[dict[str, float], Preview | None], object]
"""Takes a rollout's metrics and its first images."""


class Driver(ABC):
    """`run`, `step` and iteration over rollouts; a `Trainer` is one.

    Args:
        recipe: its `rollouts` say where the run ends.
        on_rollout: called after each rollout on the first process.
    """

    recipe: Recipe
    clock: Clock
    run_folder: Path
    stopped_by: str | None = None
    """The guard's message that ended the run."""
    interrupted = False
    """Set from outside, by a signal say: the run saves after the rollout that is going on, and ends."""
    unsaved = False
    """Whether there is more than the newest checkpoint has; where not, the run may be ended at any instant and loses nothing."""

    def __init__(self, world: World, on_rollout: OnRollout | None):
        self.world, self._on_rollout = world, on_rollout
        self._folder, self._preview = HeldRun(world), None
        self.trackers, self._display = tracking.Trackers(), Display(0, 0, Method.progress, quiet=True)
        self._page: LivePage | None = None  # the first process has it, from the first rollout to the end of the run
        self._begun = self._failed = False

    # what a trainer does in each of them -----------------------------------------------------------------

    @abstractmethod
    def save(self) -> None:
        """Writes a checkpoint."""

    @abstractmethod
    def _step(self) -> dict[str, float]:
        """Trains one rollout; returns its metrics."""

    @abstractmethod
    def _log(self, metrics: dict[str, float], display: Display) -> None:
        """Writes and shows the metrics, and asks the guards."""

    @abstractmethod
    def _evaluate(self, display: Display) -> None:
        """Evaluates and writes what came out."""

    @abstractmethod
    def _evaluated(self) -> dict[str, Any] | None:
        """The evaluation after the rollouts done so far, if it was made."""

    @abstractmethod
    def _evaluation_due(self) -> bool:
        """Whether an evaluation belongs to the rollouts done so far."""

    @abstractmethod
    def _remember(self, record: Mapping[str, Any]) -> None:
        """Takes note of an evaluation that was made before the run was resumed."""

    @abstractmethod
    def _finish(self) -> dict[str, object]:
        """Writes the summary."""

    # how it goes on --------------------------------------------------------------------------------------

    def close(self) -> None:
        """Saves what is not saved yet, and lets others write to the run's folder. `run` does so when it ends."""
        try:
            if self.unsaved and not self._failed and not self._folder.closed:
                self.save()
        finally:
            self._let_go()
            self._display.close()
            self.trackers.close()
            with suppress(UserError):  # what the disk has no room for was said by what failed before
                self._end_page()
            self._begun = False
            self._folder.close()

    @abstractmethod
    def _let_go(self) -> None:
        """Ends what goes on in the background."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def _end_page(self) -> None:
        """The page as of a run that nobody works at any more; once."""
        page, self._page = self._page, None
        if page:
            page.write(held=False)

    @property
    def done(self) -> bool:
        """Whether the run is at the recipe's last rollout, or a guard stopped it."""
        return self.clock.step >= self.recipe.rollouts or self.stopped_by is not None

    def run(self) -> dict[str, object] | None:
        """Trains to the recipe's last rollout; returns the summary, or none when interrupted or stopped by a guard.

        Ctrl-C and SIGTERM end it after the rollout that is going on, and save. It may be called again to go on from there.

        Raises:
            UserError: a reward fails or the disk is full; the last checkpoint stands.
        """
        with self._running():
            try:
                self._begin()
                stopping = False
                while not self.done and not stopping:
                    _, stopping = self._advance()
                self._note_stop()
                return self._finish() if self.clock.step == self.recipe.rollouts and not stopping else None
            except BaseException:
                self._failed = self._failed or self.unsaved
                raise
            finally:
                self.close()

    def rollout(self) -> dict[str, float]:
        """Trains one rollout and returns its metrics, with its checkpoint and evaluation where they are due; the last one ends the run.

        Raises:
            UserError: as `run`, or there is no rollout left.
            KeyboardInterrupt: Ctrl-C, after the rollout that was going on, once it is saved; `rollout` may be called again.
        """
        if self.done:
            why = (
                f"stopped by a guard: {self.stopped_by}"
                if self.stopped_by
                else f"at rollout {self.clock.step}, its last one; raise rollouts"
            )
            raise UserError(f"{self.run_folder}: nothing is left to train, the run is {why}")
        with self._running():
            try:
                self._begin()
                if self.stopped_by:
                    self._note_stop()
                    raise UserError(f"{self.run_folder}: stopped by a guard: {self.stopped_by}")
                metrics, stopping = self._advance()
                self._note_stop()
                if self.clock.step == self.recipe.rollouts and not stopping:
                    self._finish()
            except BaseException:
                self._failed = self._failed or self.unsaved
                self.close()
                raise
        if self.done or stopping:
            self.close()
        if stopping and not self.stopped_by:
            raise KeyboardInterrupt(f"saved after {self.clock.step} rollouts; go on with: Trainer(resume={str(self.run_folder)!r})")
        return metrics

    def step(self) -> dict[str, float]:
        """The name of `rollout` before version 0.2."""
        hint("Trainer", "step", "rollout", "method")
        return self.rollout()

    def __iter__(self) -> Iterator[dict[str, float]]:
        """The metrics of each rollout that is left. A loop that is left early saves."""
        try:
            yield self.rollout()
            while not self.done:
                yield self.rollout()
        finally:
            self.close()

    @contextmanager
    def _running(self) -> Iterator[None]:
        """Holds the folder; inside, signals end the run after the rollout that is going on."""
        if self._failed:
            raise UserError(f"{self.run_folder}: its run was stopped in the middle; {self._folder.again()}")
        if self._folder.closed:
            self._folder.resume_at(self.clock.step)
            self.interrupted = False
        # the command line has its own handlers, which may end a process that hangs
        with signals.handled(force=False) as ending:
            ending.protect(self, tell=self.world.rank == 0)
            yield

    def _begin(self) -> None:
        """What comes before the first rollout of this process: the display, trackers, and what is due after the rollouts so far."""
        if self._begun:
            return
        self._begun, main = True, self.world.rank == 0
        self._display = Display(self.recipe.rollouts, self.clock.step, self.recipe.objective.progress, not main, score_name_of(self.recipe))
        if main:
            self._page = LivePage(self.run_folder)
            self._display.say(f"{self.run_folder}: its page is {self._page.path}; `flowtilt watch {self.run_folder}` shows it live")
            self.trackers = tracking.open_trackers(self.recipe, self.run_folder, self.clock.step, self._display.say)
        if self.clock.step == 0:
            self.save()
        # checkpoints come before the evaluation that is due with them, which a kill may have kept from being made
        if self._evaluation_due():
            if record := self.world.on_rank0(self._evaluated):
                self._remember(record)
            else:
                self._evaluate(self._display)
        if self.recipe.guards == "stop":
            self.stopped_by = self.stopped_by or self.world.on_rank0(self._unnoticed_stop)

    def _unnoticed_stop(self) -> str | None:
        """The message of a guard that was to stop the run here, where a kill came between."""
        folder = RunFolder(self.run_folder)
        step = self.clock.step
        messages = [line.get("message") for line in runs.read_log(folder.guards) if line["rollout"] == step and line.get("stops")]
        noted = folder.stopped.is_file() and json.loads(folder.stopped.read_bytes()).get("step") == step
        return str(messages[0]) if messages and not noted else None

    def _note_stop(self) -> None:
        """Notes that a guard has ended the run, so that resuming it goes on."""
        if self.stopped_by and self.world.rank == 0:
            write_json(RunFolder(self.run_folder).stopped, {"step": self.clock.step, "message": self.stopped_by})

    def _advance(self) -> tuple[dict[str, float], bool]:
        """One rollout, and what is due after it; its metrics, and whether the run was interrupted."""
        self.unsaved = True
        metrics = self._step()
        self._log(metrics, self._display)
        if self._page:
            self._page.after_rollout()
        metrics = {"rollout": self.clock.step, **metrics}
        raised = self._show(metrics)
        stopping, complaints = self._heard(raised)
        if complaints:
            self.save()
            raise raised or UserError(f"{complaints[0]}; saved after rollout {self.clock.step}")
        due = self._evaluation_due()
        if due or stopping or self.stopped_by or self.clock.step % self.recipe.checkpoint.every == 0:
            self.save()
            stopping = self.world.any(self.interrupted)
        if due and not stopping:
            self._evaluate(self._display)
        return metrics, stopping

    def _show(self, metrics: dict[str, float]) -> BaseException | None:
        """Calls the user's own code on the first process; what it raised, if anything."""
        if self._on_rollout is None or self.world.rank:
            return None
        try:
            self._on_rollout(metrics, self._preview)
        except BaseException as error:
            return error
        return None

    def _heard(self, raised: BaseException | None) -> tuple[bool, list[str]]:
        """Whether any rank is to stop, and what the callback of the first one raised."""
        complaint = raised and f"rank {self.world.rank}: on_rollout failed: {describe_error(raised)}"
        ranks = self.world.gather_json([[self.interrupted, complaint]])
        return any(interrupted for interrupted, _ in ranks), [said for _, said in ranks if said]
