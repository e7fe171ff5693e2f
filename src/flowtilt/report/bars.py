"""Bars as inline SVG in percentages: values with whiskers, differences on both sides of zero, one divided bar for phases."""

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

from flowtilt.estimate import Estimate

LANE = 12  # px of a bar and the space below it


@dataclass(frozen=True)
class Scale:
    """What all rows of a table are drawn on. Bars begin at 0; values that differ by little are dots on what they span."""

    low: float
    high: float
    dots: bool

    def percent(self, value: float) -> float:
        return 100 * (value - self.low) / (self.high - self.low)


def scale_of(estimates: Sequence[Estimate]) -> Scale:
    """One that holds every mean and every whisker; up to 1 for scores in [0, 1]."""
    ends = [end for e in estimates if e.known for end in (e.value, *((e.low, e.high) if e.has_interval else ()))] or [0.0]
    low, high = min(ends), max(ends)
    if 0 < high - low < 0.2 * max(abs(low), abs(high)):
        margin = 0.08 * (high - low)
        return Scale(low - margin, high + margin, dots=True)
    low, high = min(0.0, low), max(0.0, high)
    return Scale(low, 1.0 if low == 0 and high <= 1 else max(high, low + 1e-9), dots=False)


def bars(estimates: Sequence[tuple[str, Estimate]], scale: Scale) -> str:
    """Bars or dots one below the other, (look, estimate) each, with whiskers; for the eye only, the numbers stand beside them."""
    parts = []
    for lane, (look, e) in enumerate(estimates):
        if not e.known:
            continue
        y, at = 1 + LANE * lane, scale.percent(e.value)
        middle = y + (LANE - 3) / 2
        if scale.dots:
            parts += [_whisker(e, scale, middle), f'<circle class="bar-{look}" cx="{at:.2f}%" cy="{middle:g}" r="4"/>']
            continue
        left, right = sorted((scale.percent(0.0), at))
        width = max(right - left, 0.4)
        parts.append(f'<rect class="bar-{look}" x="{left:.2f}%" y="{y}" width="{width:.2f}%" height="{LANE - 3}" rx="2"/>')
        parts.append(_whisker(e, scale, middle))
    track = '<rect class="track" width="100%" height="100%" rx="2"/>'
    return f'<svg class="bars" aria-hidden="true" style="height:{LANE * len(estimates) - 1}px">{track}{"".join(parts)}</svg>'


def forest(difference: Estimate) -> str:
    """A difference and its interval, zero in the middle, on a scale of its own; for the eye only."""
    ends = [difference.low, difference.high] if difference.has_interval else []
    reach = 1.15 * max(abs(end) for end in (difference.value, *ends)) or 1.0
    scale = Scale(-reach, reach, dots=True)
    side = {1: "higher", -1: "lower"}.get(difference.side, "chance")
    return (
        f'<svg class="forest {side}" aria-hidden="true"><line class="zero" x1="50%" x2="50%" y1="0" y2="100%"/>'
        f'{_whisker(difference, scale, 10)}<circle cx="{scale.percent(difference.value):.2f}%" cy="10" r="4.5"/></svg>'
    )


def _whisker(e: Estimate, scale: Scale, y: float) -> str:
    if not e.has_interval:
        return ""
    return f'<line class="whisker" x1="{scale.percent(e.low):.2f}%" x2="{scale.percent(e.high):.2f}%" y1="{y:g}" y2="{y:g}"/>'


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
