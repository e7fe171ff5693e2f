"""Numbers as a reader wants them: rounded to what they mean, with their uncertainty and their unit."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]

_SUPERSCRIPT = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")


def number(record: Mapping[str, Any], key: str) -> float:
    """A number of a record, NaN for everything else; beyond 1e100 it counts as infinite, which no axis can hold."""
    value = record.get(key)
    if isinstance(value, bool) or not isinstance(value, int | float):
        return math.nan
    return float(value) if abs(value) < 1e100 else math.nan


def short(value: float, digits: int = 3) -> str:
    """So many significant digits, with thousands separated and powers of ten where the zeros would be too many."""
    if not math.isfinite(value):
        return "–"
    size = abs(value)
    if size == 0:
        return "0"
    if size >= 1e6:
        power, letter = (9, "G") if size >= 1e9 else (6, "M")
        return f"{value / 10**power:,.{digits}g} {letter}" if size < 1e12 else scientific(value, digits - 1)
    if size >= 1000:
        return f"{value:,.0f}"
    return f"{value:.{digits}g}" if size >= 1e-3 else scientific(value, digits - 1)


def scientific(value: float, digits: int) -> str:
    """1.2×10⁻⁴, with at most that many digits after the point."""
    mantissa, exponent = f"{value:.{digits}e}".split("e")
    mantissa = mantissa.rstrip("0").rstrip(".") if "." in mantissa else mantissa
    return f"{mantissa}×10{str(int(exponent)).translate(_SUPERSCRIPT)}"


def decimals_apart(values: Sequence[float]) -> int:
    """Decimals that show the difference between values: 2 for a leap, up to 4 for a small one."""
    known = [value for value in values if math.isfinite(value)]
    spread = max(known, default=0.0) - min(known, default=0.0)
    if not 0 < spread < 0.05:
        return 2
    return 3 if spread >= 0.005 else 4


def fixed(value: float, decimals: int) -> str:
    """A number with so many decimals, – where there is none."""
    return f"{value:,.{decimals}f}" if math.isfinite(value) else "–"


def duration(seconds: float) -> str:
    """5.3 s, 58 s, 12.5 min, 3.2 h."""
    if not math.isfinite(seconds):
        return "an unknown time"
    if seconds < 99.5:
        return f"{seconds:.0f} s" if seconds >= 10 else f"{seconds:.1f} s"
    return f"{seconds / 60:.1f} min" if seconds < 5700 else f"{seconds / 3600:,.1f} h"


def counted(n: int, noun: str) -> str:
    """1 step, 2 steps, 1,200 steps."""
    return f"{n:,} {noun}" if n == 1 else f"{n:,} {noun}s"
