"""Bars as inline SVG in percentages: a pair for each tag, one divided bar for the phases of a step."""

from collections.abc import Mapping, Sequence
from html import escape

from flowtilt.report.numbers import decimals_apart, fixed


def paired_bars(before: Mapping[str, float], after: Mapping[str, float]) -> str:
    """For each tag of `after` its score before and after, on one scale that includes 0; up to 1 for scores in [0, 1]."""
    values = [*before.values(), *after.values()]
    low, high = min(0.0, *values), max(0.0, *values)
    high = 1.0 if low == 0 and high <= 1 else high
    span = (high - low) or 1.0

    def bar(value: float, y: int, look: str) -> str:
        left, right = sorted((0.0, value))
        x, width = 100 * (left - low) / span, max(100 * (right - left) / span, 0.4)
        return f'<rect class="{look}" x="{x:.2f}%" y="{y}" width="{width:.2f}%" height="9" rx="2"/>'

    rows = []
    for tag, value in after.items():
        was = before.get(tag, float("nan"))
        known = was == was
        decimals = decimals_apart([was, value])
        name = escape(tag.replace("_", " "))
        said = f"{fixed(was, decimals)} before, {fixed(value, decimals)} after" if known else f"{fixed(value, decimals)}"
        rows.append(
            f'<div class="tag-row"><span class="tag-name">{name}</span>'
            f'<svg class="pair" role="img" aria-label="{name}: {said}"><rect class="track" width="100%" height="100%" rx="2"/>'
            f"{bar(was, 3, 'bar-before') if known else ''}{bar(value, 14, 'bar-after')}</svg>"
            f'<span class="tag-value">{f"{fixed(was, decimals)} → " if known else ""}<b>{fixed(value, decimals)}</b></span></div>'
        )
    return f'<div class="tag-rows">{"".join(rows)}</div>'


def divided_bar(parts: Sequence[tuple[str, float]]) -> str:
    """One bar of (name, share) parts, shares in [0, 1] that add up to 1, coloured in order as `swatch`."""
    at, rects = 0.0, []
    for index, (name, share) in enumerate(parts):
        title = f"<title>{escape(name)} {share:.0%}</title>"
        rects.append(f'<rect class="part-{index % 7}" x="{100 * at:.2f}%" width="{100 * share:.2f}%" height="100%">{title}</rect>')
        at += share
    said = ", ".join(f"{escape(name)} {share:.0%}" for name, share in parts)
    return f'<svg class="divided" role="img" aria-label="{said}">{"".join(rects)}</svg>'


def swatch(index: int) -> str:
    """The colour of a part, beside its name in a table."""
    return f'<svg class="swatch" aria-hidden="true"><rect class="part-{index % 7}" width="100%" height="100%" rx="2"/></svg>'
