"""A run's report: one HTML file that opens offline, whatever the run has got to. No torch here."""

import os
from pathlib import Path

from flowtilt.errors import UserError
from flowtilt.io.files import write_atomic
from flowtilt.io.run_folder import RunFolder
from flowtilt.report.loading import load
from flowtilt.report.page import page

__all__ = ["write_report"]


def write_report(run: Path, held: bool | None = None) -> Path:
    """Writes `run`/report.html from what the run's folder holds so far, and returns its path.

    An older report stays whole until the new one replaces it.

    Args:
        held: whether a trainer is at work in the folder; none asks its lock.

    Raises:
        UserError: `run` is no folder, the disk is full or the folder cannot be written.
    """
    if not os.path.isdir(run):  # also where the folder above it can't be read
        raise UserError(f"run {run}: no such folder; give the folder that flowtilt train has written")
    target = RunFolder(run).report
    write_atomic(target, page(load(run, held)))
    return target
