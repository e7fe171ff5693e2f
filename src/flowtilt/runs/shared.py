"""A run's folder on all ranks: held by the first one, whose answers hold for all."""

from collections.abc import Callable
from pathlib import Path

from flowtilt.build import inputs
from flowtilt.config import Recipe
from flowtilt.distributed.world import World
from flowtilt.errors import UserError
from flowtilt.io.locks import Hold
from flowtilt.io.run_folder import RunFolder
from flowtilt.runs import checkpoint
from flowtilt.runs import folder as runs
from flowtilt.runs.checkpoint import Checkpoint


class HeldRun:
    """The folder that a trainer writes to; `path` is known once it is held."""

    def __init__(self, world: World):
        self._world = world
        self._hold: Hold | None = None
        self.path = Path()
        self.closed = True

    def create(self, recipe: Recipe) -> None:
        """As `runs.create`."""
        self._take(lambda: runs.create(recipe))

    def resume(self, folder: Path) -> None:
        """As `runs.resume`."""
        self._take(lambda: runs.resume(folder))

    def resume_at(self, step: int) -> None:
        """Holds the same folder once more; raises UserError where it is no longer at `step`."""
        self.resume(self.path)
        saved = self._world.on_rank0(
            lambda: max((number for number, _ in checkpoint.numbered(RunFolder(self.path).checkpoints)), default=0)
        )
        if saved != step:
            self.close()
            raise UserError(f"{self.path}: is at rollout {saved} by now, not {step}; {self.again()}")

    def _take(self, hold: Callable[[], Hold]) -> None:
        def take() -> str:
            self._hold = hold()
            return str(self._hold.folder)

        self.path = Path(self._world.on_rank0(take))
        self.closed = False

    def close(self) -> None:
        """Lets others write there."""
        hold, self._hold, self.closed = self._hold, None, True
        if hold:
            hold.release()

    def again(self) -> str:
        """How to go on with what the folder has."""
        return f"open it again: Trainer(resume={str(self.path)!r})"

    def compare(self, recipe: Recipe, changed: bool) -> list[str]:
        """What has changed of the files that the run was made of; raises UserError where that was not `changed` on purpose."""

        def compare() -> list[str]:
            if not changed:
                inputs.check(recipe, self.path, self.begun())
            return inputs.changes(recipe, self.path, self.begun())

        return self._world.on_rank0(compare)

    def begun(self) -> bool:
        """Whether there is a checkpoint, damaged ones included."""
        return bool(checkpoint.numbered(RunFolder(self.path).checkpoints))

    def newest(self) -> Checkpoint | None:
        """The newest whole checkpoint; see `checkpoint.newest`."""
        first: list[Checkpoint | None] = []

        def choose() -> int | None:
            first.append(checkpoint.newest(self.path))
            return first[0].step if first[0] else None

        step = self._world.on_rank0(choose)
        return None if step is None else first[0] if first else checkpoint.at(self.path, step)
