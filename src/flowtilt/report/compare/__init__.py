"""Several runs side by side, on a page, in a terminal, as JSON. No torch here."""

from pathlib import Path

from flowtilt.io.files import write_atomic
from flowtilt.report.compare.comparison import Comparison, as_json, compare
from flowtilt.report.compare.page import page
from flowtilt.report.compare.terminal import text

__all__ = ["Comparison", "as_json", "compare", "text", "write_comparison"]


def write_comparison(comparison: Comparison, target: Path) -> None:
    """Writes the page, one HTML file that opens offline; an older one stays whole until then.

    Raises:
        UserError: the disk is full or the folder cannot be written.
    """
    write_atomic(target, page(comparison))
