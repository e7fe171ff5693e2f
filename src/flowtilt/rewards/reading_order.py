"""The order in which a person reads words: along lines, which may slope, and line by line."""

from collections.abc import Sequence

import numpy as np

OBLONG = 1.5
"""How much wider than high a box is whose edge shows the direction of the text."""
SAME_LINE = 1.0
"""Two boxes beside one another are of one line if their middles are less than so many heights apart across the text."""
BESIDE = 0.2
"""Boxes stand beside one another if they share at most this part of the narrower one's width along the text."""


def reading_order(boxes: Sequence[Sequence[Sequence[float]]]) -> list[int]:
    """Indices of boxes in reading order.

    Args:
        boxes: corners of each, [n, 4, 2] in pixels, clockwise from the text's top left.
    """
    if not len(boxes):
        return []
    corners = np.asarray(boxes, dtype=np.float64)
    along, down = corners[:, 1] - corners[:, 0], corners[:, 3] - corners[:, 0]
    widths, heights = np.hypot(*along.T), np.hypot(*down.T)
    angle = _direction(along, widths, heights)
    turn = np.array([[np.cos(angle), np.sin(angle)], [-np.sin(angle), np.cos(angle)]])
    middles = corners.mean(axis=1) @ turn.T
    lines: list[list[int]] = []
    for k in np.argsort(middles[:, 1], kind="stable").tolist():
        fitting = [line for line in lines if _belongs(k, line, middles, widths, heights)]
        if fitting:
            min(fitting, key=lambda line: min(abs(middles[k, 1] - middles[m, 1]) for m in line)).append(k)
        else:
            lines.append([k])
    lines.sort(key=lambda line: float(np.mean(middles[line, 1])))
    return [k for line in lines for k in sorted(line, key=lambda m: middles[m, 0])]


def _direction(along: np.ndarray, widths: np.ndarray, heights: np.ndarray) -> float:
    """The angle of the text in radians: the median over oblong boxes, each as often as it is wide; 0 without one."""
    oblong = widths > OBLONG * heights
    if not oblong.any():
        return 0.0
    angles = np.arctan2(along[oblong, 1], along[oblong, 0])
    order = np.argsort(angles)
    summed = np.cumsum(widths[oblong][order])
    return float(angles[order][np.searchsorted(summed, summed[-1] / 2)])


def _belongs(k: int, line: Sequence[int], middles: np.ndarray, widths: np.ndarray, heights: np.ndarray) -> bool:
    """Whether a box stands beside all of a line's, at the height of the nearest."""
    for m in line:
        shared = min(middles[k, 0] + widths[k] / 2, middles[m, 0] + widths[m] / 2) - max(
            middles[k, 0] - widths[k] / 2, middles[m, 0] - widths[m] / 2
        )
        if shared > BESIDE * min(widths[k], widths[m]):
            return False
    nearest = min(line, key=lambda m: abs(middles[k, 0] - middles[m, 0]))
    return bool(abs(middles[k, 1] - middles[nearest, 1]) < SAME_LINE * min(heights[k], heights[nearest]))
