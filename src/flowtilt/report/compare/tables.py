"""The tables of a comparison as text, from which both the page and the terminal are made."""

import math
from dataclasses import dataclass
from typing import NamedTuple

from flowtilt.report.compare.comparison import Comparison, Reach
from flowtilt.report.compare.costs import COSTS, Unit
from flowtilt.report.compare.entries import plain
from flowtilt.report.compare.methods import Method, telling
from flowtilt.report.compare.spans import Ratio, Span
from flowtilt.report.numbers import counted, decimals_apart, fixed, short


class Cell(NamedTuple):
    """What a table says, and what it says more quietly, such as the lowest and the highest of seeds."""

    main: str
    more: str = ""


@dataclass(frozen=True)
class Table:
    """One row a method, in the comparison's order; `head` names the columns after the method's own."""

    title: str
    head: list[str]
    rows: list[list[Cell]]


def scores(comparison: Comparison) -> Table:
    """Seeds, final and best score."""
    digits = score_digits(comparison)
    rows = [
        [Cell(seeds(method)), score_cell(comparison.final(method), digits), score_cell(comparison.best(method), digits)]
        for method in comparison.methods
    ]
    return Table("", ["seeds", "final score", "best score"], rows)


def totals(comparison: Comparison) -> Table:
    """All that was spent, on every axis."""
    units = {cost: comparison.unit(cost) for cost in COSTS if cost in comparison.axes}
    rows = [[cost_cell(comparison.total(method, cost), unit) for cost, unit in units.items()] for method in comparison.methods]
    return Table("", [unit.name for unit in units.values()], rows)


def by_cost(comparison: Comparison, cost: str) -> list[Table]:
    """What each target took, and the score at equal cost where there are methods to compare."""
    found = [_to_reach(comparison, cost, target) for target in comparison.targets]
    return found + ([_at_equal_cost(comparison, cost)] if len(comparison.methods) > 1 else [])


def _at_equal_cost(comparison: Comparison, cost: str) -> Table:
    """Score at the cost where the shortest run ends."""
    digits, unit = score_digits(comparison), comparison.unit(cost)
    title = f"At {unit.written(comparison.shortest(cost))}, the shortest run's end"
    rows = [[score_cell(comparison.at_equal_cost(method, cost), digits)] for method in comparison.methods]
    return Table(title, ["score"], rows)


def _to_reach(comparison: Comparison, cost: str, target: float) -> Table:
    """What it took to reach a target."""
    unit = comparison.unit(cost)
    rows = []
    for method in comparison.methods:
        reach = comparison.reach(method, cost, target)
        told = [Cell(f"{reach.runs} of {len(method.entries)}")] if _has_seeds(comparison) else []
        against = [ratio_cell(reach.against)] if len(comparison.methods) > 1 else []
        rows.append([reach_cell(reach, unit), *told, *against])
    head = [unit.name, *(["seeds"] if _has_seeds(comparison) else []), *(["of the first"] if len(comparison.methods) > 1 else [])]
    return Table(f"To reach {short(target)}", head, rows)


def _has_seeds(comparison: Comparison) -> bool:
    return any(len(method.entries) > 1 for method in comparison.methods)


def settings(comparison: Comparison) -> tuple[list[str], list[list[str]]]:
    """Keys of recipes that differ between methods, and a row of values for each, a value a method."""
    found = [method.settings for method in comparison.methods]
    keys = list(dict.fromkeys([*telling(found), *(key for one in found for key in one if any(key not in other for other in found))]))
    return keys, [[plain(one[key]) if key in one else "–" for one in found] for key in keys]


def seeds(method: Method) -> str:
    """0 to 4, or 0, 3, 7."""
    found = method.seeds
    whole = len(found) > 2 and found == list(range(found[0], found[-1] + 1))
    return f"{found[0]} to {found[-1]}" if whole else ", ".join(map(str, found))


def score_digits(comparison: Comparison) -> int:
    """Decimals of all scores: 3 below 10, as of means of rights and wrongs; more where finals would look alike."""
    finals = [comparison.final(method).median for method in comparison.methods]
    size = max(abs(float(entry.scores.max())) for entry in comparison.entries)
    return max(decimals_apart(finals), 3 if size < 10 else 2)


def score_cell(found: Span, digits: int) -> Cell:
    """0.917, 0.896 to 0.938."""
    more = f"{fixed(found.low, digits)} to {fixed(found.high, digits)}" if found.low != found.high else ""
    return Cell(fixed(found.median, digits), more)


def cost_cell(found: Span, unit: Unit) -> Cell:
    low, high = (short(end / unit.factor) if math.isfinite(end) else "not reached" for end in (found.low, found.high))
    return Cell(short(found.median / unit.factor), f"{low} to {high}" if low != high else "")


def reach_cell(reach: Reach, unit: Unit) -> Cell:
    """The cost, or that it was not enough for half of the seeds."""
    if math.isfinite(reach.span.median):
        return cost_cell(reach.span, unit)
    return Cell("not reached", f"fastest seed {short(reach.span.low / unit.factor)}" if reach.runs else "")


def ratio_cell(against: Ratio | None) -> Cell:
    """0.43 ×, 0.31 to 0.6."""
    if against is None:
        return Cell("1 ×")
    if math.isnan(against.median):
        return Cell("–")
    if against.bound:
        return Cell(f"{against.bound} {short(against.median, 2)} ×")
    low = short(against.low, 2) if against.low > 0 else "?"
    high = short(against.high, 2) if math.isfinite(against.high) else "?"
    return Cell(f"{short(against.median, 2)} ×", f"{low} to {high}" if low != high else "")


def lead(comparison: Comparison) -> tuple[str, str]:
    """The result in a sentence of plain text, by the leading axis and the highest target that a median reached, and a doubt or ""."""
    digits, methods = score_digits(comparison), comparison.methods
    if len(methods) == 1:
        return f"{methods[0].label}: final score {phrase(score_cell(comparison.final(methods[0]), digits))}.", ""
    for target in reversed(comparison.targets):
        spans = {method.label: comparison.reach(method, comparison.axes[0], target).span for method in methods}
        if any(math.isfinite(found.median) for found in spans.values()):
            return _first_to(comparison, target, spans)
    finals = {method.label: comparison.final(method) for method in methods}
    highest = max(finals.values(), key=lambda found: found.median)
    best = [label for label, found in finals.items() if found.median == highest.median]
    said = f"{' and '.join(best)}, {phrase(score_cell(highest, digits))}."
    none = f"No method reached {short(comparison.targets[0])}. " if comparison.targets else ""
    return f"{none}The highest final score is that of {said}", ""


def _first_to(comparison: Comparison, target: float, spans: dict[str, Span]) -> tuple[str, str]:
    cost = comparison.axes[0]
    unit, baseline = comparison.unit(cost), comparison.methods[0].label
    fastest, second = sorted(spans, key=lambda label: (spans[label].median, spans[label].low))[:2]
    other = second if fastest == baseline else baseline
    took = f"after {unit.written(spans[other].median)}" if math.isfinite(spans[other].median) else "did not get there"
    said = f"{fastest} was first to {short(target)}, after {unit.written(spans[fastest].median)} {COSTS[cost].behind}; {other} {took}."
    overlap = spans[second].low <= spans[fastest].high
    return said, f"Seeds of {fastest} and {second} overlap, so that their order may be chance." if overlap else ""


def phrase(cell: Cell) -> str:
    """0.917 (0.896 to 0.938)."""
    return f"{cell.main} ({cell.more})" if cell.more else cell.main


def counts(comparison: Comparison) -> str:
    """3 methods, 9 runs."""
    return f"{counted(len(comparison.methods), 'method')}, {counted(len(comparison.entries), 'run')}"
