"""A comparison as plain text for a terminal."""

from flowtilt.io.columns import aligned, wrapped
from flowtilt.report.compare.comparison import Comparison
from flowtilt.report.compare.tables import Table, by_cost, lead, phrase, scores, totals

LONGEST = 48
"""Letters of a method's name."""


def text(comparison: Comparison) -> str:
    """The notes, the tables on the leading axis, and the result in one sentence."""
    tables = [scores(comparison), totals(comparison), *by_cost(comparison, comparison.axes[0])]
    names = [_cut(method.label) for method in comparison.methods]
    blocks = ["\n".join(line for note in comparison.notes for line in wrapped(f"note: {note}", ""))] if comparison.notes else []
    said = "\n".join(wrapped(" ".join(lead(comparison)).rstrip(), ""))
    return _safe("\n\n".join([*blocks, *(_block(table, names) for table in tables), said]))


def _block(table: Table, names: list[str]) -> str:
    rows = [[phrase(cell) for cell in row] for row in table.rows]
    title = [table.title] if table.title else []
    return "\n".join([*title, aligned([["method", *table.head], *([name, *row] for name, row in zip(names, rows, strict=True))])])


def _cut(name: str) -> str:
    return name if len(name) <= LONGEST else name[: LONGEST - 3] + "..."


def _safe(text: str) -> str:
    """What a terminal would obey instead of showing is replaced, and what it may lack."""
    plain = text.replace("×", "x").replace("–", "-")
    return "".join(letter if letter.isprintable() or letter == "\n" else "?" for letter in plain)
