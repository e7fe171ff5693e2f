"""Means with intervals, written alike in a terminal and on a page."""

import math
from collections.abc import Sequence

from flowtilt.estimate import EXACT, Estimate
from flowtilt.report.evaluation.loading import Column, PromptSet
from flowtilt.report.numbers import counted
from flowtilt.rewards.about import about_column


def reader_note(column: Column) -> str:
    """What a reader should know of a score of a built-in reward; "" where there is nothing."""
    about = about_column(column.name)
    return about.detail_notes.get(column.name.partition("/")[2], "") if about else ""


def decimals(estimates: Sequence[Estimate]) -> int:
    """3 for scores below 10, fewer above; up to 2 more where the narrowest interval would not show."""
    size = max((abs(e.value) for e in estimates if e.known), default=0.0)
    least = 3 if size < 10 else 2 if size < 100 else 1 if size < 1000 else 0
    # a width that is only rounding is none
    halves = [(e.high - e.low) / 2 for e in estimates if e.has_interval and e.high - e.low > 1e-9 * size]
    needed = -math.floor(math.log10(min(halves))) if halves else 0
    return min(max(least, needed), least + 2)


def column_decimals(column: Column) -> int:
    """The same for everything that is said of one score, so that it can be compared by eye."""
    summaries = column.of.values()
    estimates = [e for s in summaries for e in (s.overall, s.of_tags) if e]
    return decimals(estimates + ([column.difference.estimate] if column.difference else []))


def difference_decimals(column: Column) -> int:
    """As many as the column has, and more where an edge that is not 0 would read as 0."""
    digits = column_decimals(column)
    edges = [column.difference.estimate.low, column.difference.estimate.high] if column.difference else []
    nearest = min((abs(edge) for edge in edges if math.isfinite(edge) and edge), default=1.0)
    return min(max(digits, -math.floor(math.log10(2 * nearest))), digits + 2)


def written(value: float, digits: int, signed: bool = False) -> str:
    """A number with so many decimals, "-" where there is none; +0.012 where `signed`, and never -0.000."""
    if not math.isfinite(value):
        return "-"
    sign = "+" if signed else ""
    text = f"{value:{sign}.{digits}f}" if abs(value) < 1e5 else f"{value:{sign}.2e}"
    return text.lstrip("+-") if float(text) == 0 else text


def bracketed(estimate: Estimate, digits: int, signed: bool = False) -> str:
    """[0.918, 0.963], with "exact" where it is the exact bound; [no interval]; "" where there is no value."""
    if not estimate.has_interval:
        return "[no interval]" if estimate.known else ""
    exact = " exact" if estimate.kind == EXACT else ""
    return f"[{written(estimate.low, digits, signed)}, {written(estimate.high, digits, signed)}]{exact}"


def verdict(estimate: Estimate) -> str:
    """What the interval of a difference says, in words; "" where there is no difference."""
    if not estimate.known:
        return ""
    if not estimate.has_interval:
        return f"no interval: {estimate.why_none}"
    if estimate.side:
        return f"{'higher' if estimate.side > 0 else 'lower'}: interval excludes 0"
    return "may be chance: interval includes 0" if estimate.value else "no difference: interval includes 0"


def reasons(estimates: Sequence[Estimate]) -> list[str]:
    """Why there are means without an interval, each reason once."""
    return list(dict.fromkeys(e.why_none for e in estimates if e.why_none))


def missing(estimate: Estimate) -> str:
    """3 of 2,212 missing; "" where none is."""
    return f"{estimate.missing:,} of {estimate.images:,} missing" if estimate.missing else ""


def extent(prompts: int, images: int) -> str:
    """553 prompts, 2,212 images; only what is known."""
    return ", ".join(counted(n, noun) for n, noun in ((prompts, "prompt"), (images, "image")) if n)


def rows_of(one: PromptSet, column: Column) -> list[tuple[str, dict[str, Estimate]]]:
    """(which mean, variant -> estimate): one row, with an empty name for the mean over images, or one for each of the two means.

    Scores whose papers print either have two; so has what a set is judged by first. Of other scores only the mean over images
    is ever printed.
    """
    overall = {variant: summary.overall for variant, summary in column.of.items()}
    of_tags = {variant: summary.of_tags for variant, summary in column.of.items() if summary.of_tags}
    is_first = column.reward == one.columns[0].reward
    about = about_column(column.name)
    if of_tags and (is_first or (about is not None and about.mean_over_tags)):
        return [("mean over images", overall), ("mean over tags", of_tags)]
    return [("", overall)]
