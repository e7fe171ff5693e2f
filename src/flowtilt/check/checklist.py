"""Steps one after another, each with one line: what is well, or what to do."""

from collections.abc import Callable, Sequence

from flowtilt.errors import UserError
from flowtilt.io.user_errors import HINT, describe_error, is_fault

OK, FAILED, SKIPPED, NOTE = "ok", "FAILED", "skipped", "note"


class Checklist:
    """Takes steps and says a line for each.

    Args:
        say: takes each line as soon as its step has ended.
    """

    def __init__(self, say: Callable[[str], None]):
        self._say = say
        self._passed: set[str] = set()
        self.failed: list[str] = []
        """Names of the steps that failed."""

    def step(self, name: str, work: Callable[[], str], needs: Sequence[str] = ()) -> bool:
        """Runs a step; returns whether it passed.

        Args:
            work: returns what to say where all is well, and raises where it is not.
            needs: steps without which this one is skipped.
        """
        if lacking := [other for other in needs if other not in self._passed]:
            self._line(SKIPPED, name, f"needs {' and '.join(lacking)}")
            return False
        try:
            text = work()
        except BaseException as error:
            if not is_fault(error):
                raise
            self.failed.append(name)
            self._line(FAILED, name, _advice(error))
            return False
        self._passed.add(name)
        self._line(OK, name, text)
        return True

    def note(self, name: str, text: str) -> None:
        """Says what is neither well nor wrong."""
        self._line(NOTE, name, text)

    def _line(self, status: str, name: str, text: str) -> None:
        self._say(f"{status:8}{name}: {' '.join(text.split())}")


def _advice(error: BaseException) -> str:
    if isinstance(error, UserError):
        return str(error)
    if type(error).__name__ == "OutOfMemoryError":
        return (
            "the GPU's memory is not enough; set model.offload=true and model.recompute=true, or lower model.resolution; "
            "`flowtilt plan` says what takes how much"
        )
    return f"{describe_error(error)} ({HINT})"
