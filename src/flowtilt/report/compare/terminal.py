"""A comparison as plain text for a terminal."""

from flowtilt.columns import aligned, wrapped
from flowtilt.report.compare.comparison import Comparison
from flowtilt.report.compare.tables import Table, at_equal_cost, lead, phrase, scores, to_reach, totals

LONGEST = 48
"""Letters of a method's name."""


def text(comparison: Comparison) -> str:
    """The notes, the tables on the leading axis, and the result in one sentence."""
    cost = comparison.axes[0]
    reaches = [to_reach(comparison, cost, target) for target in comparison.targets]
    tables = [scores(comparison), totals(comparison), at_equal_cost(comparison, cost), *reaches]
    names = [_cut(method.label) for method in comparison.methods]
    blocks = ["\n".join(line for note in comparison.notes for line in wrapped(f"note: {note}", ""))] if comparison.notes else []
    return "\n\n".join([*blocks, *(_block(table, names) for table in tables), "\n".join(wrapped(" ".join(lead(comparison)).rstrip(), ""))])


def _block(table: Table, names: list[str]) -> str:
    rows = [[phrase(cell) for cell in row] for row in table.rows]
    title = [table.title] if table.title else []
    return "\n".join([*title, aligned([["method", *table.head], *([name, *row] for name, row in zip(names, rows, strict=True))])])


def _cut(name: str) -> str:
    plain = "".join(letter if letter.isprintable() else "?" for letter in name)
    return plain if len(plain) <= LONGEST else plain[: LONGEST - 3] + "..."
