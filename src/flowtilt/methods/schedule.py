"""Values that change in the course of a run."""

from itertools import pairwise
from typing import Annotated

from pydantic import AfterValidator, BaseModel, BeforeValidator, Field
from pydantic_core import PydanticCustomError

from flowtilt.methods.base import as_tuple

Point = tuple[Annotated[float, Field(ge=0, le=1e9)], Annotated[float, Field(ge=0, le=1e6)]]


def value_at(schedule: float | tuple[Point, ...], x: float) -> float:
    """The value at x: a number is constant; points (x, value) are joined by straight lines, level before the first and after the last."""
    if not isinstance(schedule, tuple):
        return float(schedule)
    if x <= schedule[0][0]:
        return schedule[0][1]
    for (x0, y0), (x1, y1) in pairwise(schedule):
        if x <= x1:
            return y0 + (y1 - y0) * (x - x0) / (x1 - x0)
    return schedule[-1][1]


def _tuples(value: object) -> object:
    return as_tuple([as_tuple(point) for point in value]) if isinstance(value, list) else value


def _increasing(schedule: float | tuple[Point, ...]) -> float | tuple[Point, ...]:
    if isinstance(schedule, tuple):
        if not schedule:
            raise PydanticCustomError("no_points", "has no points; give a number, or points as [[0, 1.0], [100, 0.1]]")
        if any(a >= b for (a, _), (b, _) in pairwise(schedule)):
            raise PydanticCustomError("not_increasing", "the first numbers of its points must increase")
    return schedule


ALONG = "along the run"
"""Marks keys whose points lie along the run."""
Schedule = Annotated[
    Annotated[float, Field(ge=0, le=1e6)] | tuple[Point, ...], BeforeValidator(_tuples), AfterValidator(_increasing), ALONG
]
"""A number, or points [[x, value], ...] joined by straight lines."""


def stretched(table: BaseModel, factor: float) -> dict[str, tuple[Point, ...]]:
    """What becomes of a table's schedules in a run that is `factor` times as long, by their keys; numbers are left out."""
    found = {name: getattr(table, name) for name, field in type(table).model_fields.items() if ALONG in field.metadata}
    return {name: tuple((round(x * factor, 2), y) for x, y in points) for name, points in found.items() if isinstance(points, tuple)}
