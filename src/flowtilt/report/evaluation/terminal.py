"""An evaluation's results as plain text for a terminal."""

from dataclasses import dataclass
from typing import Any

from flowtilt.report.evaluation.estimates import (
    bracketed,
    column_decimals,
    difference_decimals,
    extent,
    missing,
    reader_note,
    reasons,
    rows_of,
    verdict,
    written,
)
from flowtilt.report.evaluation.loading import PromptSet, Results, parse

WIDTH = 110


@dataclass(frozen=True)
class _Row:
    """`name` is cut where room is short, `which`, the cells and the note after them are not."""

    name: str
    which: str
    cells: list[str]
    note: str = ""


def table(results: dict[str, Any]) -> str:
    """The means of every set and score with their 95 % intervals, and against a base the paired differences.

    Args:
        results: as in results.json.

    Returns:
        lines of at most 110 columns, the last without a line's end.
    """
    read = parse(results)
    blocks = [_aligned(_means(read))] if read.sets else ["no scores"]
    shown = [e for one in read.sets for column in one.columns for _, of in rows_of(one, column) for e in of.values()]
    blocks += ["\n".join(_fit(f"no interval: {why}", WIDTH) for why in reasons(shown))] if reasons(shown) else []
    compared = any(column.difference for one in read.sets for column in one.columns)
    blocks += [_aligned(_differences(read))] if compared else []
    blocks += (
        ["\n".join(_fit(f"left out on {name}: {reward}: {why}", WIDTH) for name, reward, why in read.left_out)] if read.left_out else []
    )
    return "\n\n".join(blocks)


def _means(results: Results) -> list[_Row | str]:
    rows: list[_Row | str] = [_Row("", "", results.variants if results.compares else ["mean [95 %]"])]
    for one in results.sets:
        rows.append(_head(one))
        for column in one.columns:
            digits = column_decimals(column)
            for which, of in rows_of(one, column):
                cells = [
                    f"{written(of[v].value, digits)} {bracketed(of[v], digits)}" if v in of and of[v].known else "-"
                    for v in results.variants
                ]
                rows.append(_Row(f"  {column.name}", f", {which}" if which else "", cells, reader_note(column)))
            lost = {variant: missing(summary.overall) for variant, summary in column.of.items()}
            rows += [f"    {f'{variant}: ' if results.compares else ''}{said}" for variant, said in lost.items() if said]
    return rows


def _differences(results: Results) -> list[_Row | str]:
    rows: list[_Row | str] = [_Row("", "", ["tuned minus base", "wins", "ties"])]
    for one in results.sets:
        compared = [(column, column.difference) for column in one.columns if column.difference]
        rows += [_head(one)] if compared else []
        for column, difference in compared:
            estimate, digits = difference.estimate, difference_decimals(column)
            mean = f"{written(estimate.value, digits, True)} {bracketed(estimate, digits, True)}" if estimate.known else "-"
            shares = [f"{share:.0%}" if share == share else "-" for share in (difference.wins, difference.ties)]
            rows.append(_Row(f"  {column.name}", "", [mean, *shares], verdict(estimate)))
            rows += [f"    pairs: {missing(estimate)}"] if estimate.missing else []
    return rows


def _head(one: PromptSet) -> str:
    size = extent(one.prompts, one.images)
    return f"{one.name} ({size})" if size else one.name


def _aligned(lines: list[_Row | str]) -> str:
    """Cells below each other; whole lines between them as they are."""
    rows = [line for line in lines if isinstance(line, _Row)]
    widths = [max(len(row.cells[i]) for row in rows) for i in range(len(rows[0].cells))]
    room = WIDTH - sum(widths) - 2 * len(widths) - max((2 + len(row.note) for row in rows if row.note), default=0)
    first = min(max(len(row.name + row.which) for row in rows), max(room, 22 + max(len(row.which) for row in rows)))
    found = []
    for line in lines:
        if isinstance(line, str):
            found.append(_fit(line, WIDTH))
            continue
        name = (_fit(line.name, first - len(line.which)) + line.which).ljust(first)
        text = "  ".join([name, *(cell.rjust(width) for cell, width in zip(line.cells, widths, strict=True))])
        noted = f"{text}  {line.note}"
        found.append((noted if len(noted) <= WIDTH else text).rstrip())
    return "\n".join(found)


def _fit(text: str, width: int) -> str:
    """At most so many columns; what a terminal would obey instead of showing is replaced."""
    plain = "".join(letter if letter.isprintable() else "?" for letter in text)
    return plain if len(plain) <= width else plain[: width - 3] + "..."
