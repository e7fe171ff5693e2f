"""The page of a run while it goes on."""

import time
from pathlib import Path

from flowtilt.io.run_folder import RunFolder
from flowtilt.report import write_report

EVERY = 10.0
"""Seconds between two pages, at least."""
SHARE = 0.01
"""Of the time of a run, at most, that goes into writing its page between evaluations."""


class LivePage:
    """Writes a run's page at once, and anew while the run goes on.

    Args:
        run: its folder.
    """

    def __init__(self, run: Path):
        self._run, self.path = run, RunFolder(run).report
        self._next = 0.0
        self.write()

    def write(self, held: bool = True) -> None:
        """Writes the page; `held` is false at the end of a run's work.

        Raises:
            UserError: the disk is full or the folder can't be written.
        """
        began = time.monotonic()
        write_report(self._run, held)
        now = time.monotonic()
        self._next = now + max(EVERY, (now - began) / SHARE)

    def after_rollout(self) -> None:
        """Writes the page where the last one is old enough."""
        if time.monotonic() >= self._next:
            self.write()
