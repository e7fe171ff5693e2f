"""From an evaluation's images to its table."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from flowtilt.environment import versions
from flowtilt.statistics import paired, summary

SHARES = (
    *("playground", "playground_strict", "playground_partial", "playground_smooth", "ocr"),
    *("geneval", "geneval/strict", "geneval/correct"),
)
"""Scores that lie in [0, 1] by definition, so that an interval can be given also where all prompts score alike."""


def results_of(records: Sequence[Mapping[str, Any]], variants: Sequence[str], protocol: Mapping[str, Any]) -> dict[str, Any]:
    """results.json: for each set and column the mean with its interval, over tags and by tag; paired differences for two variants.

    Args:
        records: one an image, see `evaluate.folder`.
        variants: the first is compared with the second.
        protocol: how the images were made and judged; kept beside the numbers.
    """
    sets: dict[str, Any] = {}
    for name in dict.fromkeys(record["set"] for record in records):
        of_set = {variant: [r for r in records if r["set"] == name and r["variant"] == variant] for variant in variants}
        first = of_set[variants[0]]
        clusters = np.array([record["index"] for record in first])
        tags = [record["tag"] for record in first]
        strata = np.array(tags) if len(set(tags)) > 1 else None
        columns: dict[str, Any] = {}
        for column in dict.fromkeys(column for record in first for column in record["scores"]):
            values = {variant: _values(of_set[variant], column) for variant in variants}
            bounds = _bounds(column, list(values.values()))
            columns[column] = {variant: summary(values[variant], clusters, strata, bounds=bounds) for variant in variants}
            if len(variants) == 2:
                columns[column]["difference"] = paired(values[variants[0]], values[variants[1]], clusters, strata, bounds=bounds)
        sets[name] = {"prompts": len(set(clusters.tolist())), "images": len(first), "columns": columns}
    return {
        "protocol": dict(protocol),
        "variants": list(variants),
        "sets": sets,
        "left_out": protocol.get("left_out", []),
        "packages": versions(),
    }


def _bounds(column: str, values: Sequence[np.ndarray]) -> tuple[float, float] | None:
    """Those of a share; a reward of the user's may have a share's name and another range, as `compat` gives GenEval's."""
    known = np.concatenate(values)
    known = known[~np.isnan(known)]
    return (0.0, 1.0) if column in SHARES and ((known >= 0) & (known <= 1)).all() else None


def _values(records: Sequence[Mapping[str, Any]], column: str) -> np.ndarray:
    found = [record["scores"].get(column) for record in records]
    return np.array([np.nan if value is None else value for value in found], dtype=np.float64)
