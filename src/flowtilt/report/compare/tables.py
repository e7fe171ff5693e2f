"""The tables of a comparison as text, from which both the page and the terminal are made."""

import math
from dataclasses import dataclass
from typing import NamedTuple

from flowtilt.estimate import Estimate
from flowtilt.report.compare.comparison import Comparison, Reach
from flowtilt.report.compare.costs import COSTS, Unit
from flowtilt.report.compare.entries import plain
from flowtilt.report.compare.methods import Method, telling
from flowtilt.report.compare.spans import Ratio, span
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
        seeds = [Cell(f"{reach.runs} of {len(method.entries)}")] if _has_seeds(comparison) else []
        against = [ratio_cell(reach.against)] if len(comparison.methods) > 1 else []
        rows.append([reach_cell(reach, unit), *seeds, *against])
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
    finals = [comparison.final(method).value for method in comparison.methods]
    size = max(abs(float(entry.scores.max())) for entry in comparison.entries)
    return max(decimals_apart(finals), 3 if size < 10 else 2)


def score_cell(found: Estimate, digits: int) -> Cell:
    """0.917, 0.896 to 0.938."""
    more = f"{fixed(found.low, digits)} to {fixed(found.high, digits)}" if found.low != found.high else ""
    return Cell(fixed(found.value, digits), more)


def cost_cell(found: Estimate, unit: Unit) -> Cell:
    low, high = (short(end / unit.factor) if math.isfinite(end) else "not reached" for end in (found.low, found.high))
    return Cell(short(found.value / unit.factor), f"{low} to {high}" if low != high else "")


def reach_cell(reach: Reach, unit: Unit) -> Cell:
    """The cost, or what half of the seeds spent without getting there."""
    if reach.at_start:
        return Cell("at the start")
    if math.isfinite(reach.span.value):
        return cost_cell(reach.span, unit)
    ended = f"in {short(span(reach.spent).value / unit.factor)}"
    return Cell("not reached", f"{ended}, fastest seed {short(reach.span.low / unit.factor)}" if reach.runs else ended)


def ratio_cell(against: Ratio | None) -> Cell:
    """0.43 ×, 0.31 to 0.6; what is known in words where one of the two never got there."""
    if against is None:
        return Cell("1 ×")
    found = against.of
    times = f"{short(found.value, 2)} ×"
    known = {
        "<": Cell(f"less than {times}", "the first did not get there"),
        ">": Cell(f"more than {times}", "did not get there"),
        "method": Cell("not known", f"ended at {times} the first's cost"),
        "baseline": Cell("not known", f"the first ended at {short(1 / found.value, 2)} × this cost" if found.value else ""),
    }
    if against.bound:
        return known[against.bound]
    if math.isnan(found.value):
        return Cell("–")
    low = short(found.low, 2) if found.low > 0 else "?"
    high = short(found.high, 2) if math.isfinite(found.high) else "?"
    return Cell(times, f"{low} to {high}" if low != high else "")


def lead(comparison: Comparison) -> tuple[str, str]:
    """The result in a sentence or two of plain text, by the leading axis and the highest target that can be judged, and a doubt or "".

    Methods are judged only as far as all of them have been: one that ended before another got there may have got there sooner.
    """
    digits, methods, cost = score_digits(comparison), comparison.methods, comparison.axes[0]
    if len(methods) == 1:
        return f"{methods[0].label}: final score {phrase(score_cell(comparison.final(methods[0]), digits))}.", ""
    for target in reversed(comparison.targets):
        reaches = {method.label: comparison.reach(method, cost, target) for method in methods}
        if any(math.isfinite(found.span.value) for found in reaches.values()) and not any(found.at_start for found in reaches.values()):
            return _first_to(comparison, target, reaches)
    none = [target for target in comparison.targets if all(math.isinf(comparison.reach(m, cost, target).span.value) for m in methods)]
    said = f"No method reached {short(none[0])}. " if none else ""
    return f"{said}{_at_equal_cost_said(comparison)}", ""


def _at_equal_cost_said(comparison: Comparison) -> str:
    """Which method scores highest where the shortest run ends."""
    cost, digits = comparison.axes[0], score_digits(comparison)
    shared = comparison.shortest(cost)
    if not shared:
        return "A run has no evaluation after training began, so nothing can be compared yet."
    found = {method.label: comparison.at_equal_cost(method, cost) for method in comparison.methods}
    highest = max(found.values(), key=lambda one: one.value)
    best = [label for label, one in found.items() if one.value == highest.value]
    score = phrase(score_cell(highest, digits))
    if shared == comparison.longest(cost):
        return f"The highest final score is that of {' and '.join(best)}, {score}."
    at = f"At {comparison.unit(cost).written(shared)} {COSTS[cost].behind}, where the shortest run ends"
    return f"{at}, the highest score is that of {' and '.join(best)}, {score}."


def _first_to(comparison: Comparison, target: float, reaches: dict[str, Reach]) -> tuple[str, str]:
    cost = comparison.axes[0]
    unit, baseline = comparison.unit(cost), comparison.methods[0].label
    fastest, second = sorted(reaches, key=lambda label: (reaches[label].span.value, reaches[label].span.low))[:2]
    spans = {label: reach.span for label, reach in reaches.items()}
    after = f"after {unit.written(spans[fastest].value)} {COSTS[cost].behind}"
    ends = {label: span(reach.spent).value for label, reach in reaches.items() if math.isinf(reach.span.value)}
    short_of = [label for label, end in ends.items() if end < spans[fastest].value]
    if short_of:
        ended = " and ".join(f"{label} at {unit.written(ends[label])}" for label in short_of)
        judged = f"Runs ended before that, {ended}, so which is first is not known."
        return f"{fastest} reached {short(target)} {after}. {judged} {_at_equal_cost_said(comparison)}", ""
    other = second if fastest == baseline else baseline
    took = f"had not reached it after {unit.written(ends[other])}" if other in ends else f"after {unit.written(spans[other].value)}"
    said = f"{fastest} was first to {short(target)}, {after}; {other} {took}."
    overlap = spans[second].low <= spans[fastest].high
    return said, f"Seeds of {fastest} and {second} overlap, so that their order may be chance." if overlap else ""


def phrase(cell: Cell) -> str:
    """0.917 (0.896 to 0.938)."""
    return f"{cell.main} ({cell.more})" if cell.more else cell.main


def counts(comparison: Comparison) -> str:
    """3 methods, 9 runs."""
    return f"{counted(len(comparison.methods), 'method')}, {counted(len(comparison.entries), 'run')}"
