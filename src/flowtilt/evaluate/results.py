"""From an evaluation's images to its table."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from flowtilt.io.environment import versions
from flowtilt.statistics import Bounds, bounds_within, paired, summary


def results_of(
    records: Sequence[Mapping[str, Any]], variants: Sequence[str], protocol: Mapping[str, Any], ranges: Mapping[str, Bounds]
) -> dict[str, Any]:
    """results.json: for each set and column the mean with its interval, over tags and by tag; paired differences for two variants.

    Args:
        records: one an image, see `evaluate.folder`.
        variants: the first is compared with the second.
        protocol: how the images were made and judged; kept beside the numbers.
        ranges: the lowest and highest possible score by column, where they are known; see `rewards.facts.ranges_of`.
    """
    sets: dict[str, Any] = {}
    for name in dict.fromkeys(record["set"] for record in records):
        of_set = {variant: [r for r in records if r["set"] == name and r["variant"] == variant] for variant in variants}
        first = of_set[variants[0]]
        clusters = np.array([record["index"] for record in first])
        strata = np.array([record["tag"] for record in first])
        columns: dict[str, Any] = {}
        for column in dict.fromkeys(column for record in first for column in record["scores"]):
            values = {variant: _values(of_set[variant], column) for variant in variants}
            bounds = bounds_within(ranges.get(column), list(values.values()))
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


def _values(records: Sequence[Mapping[str, Any]], column: str) -> np.ndarray:
    found = [record["scores"].get(column) for record in records]
    return np.array([np.nan if value is None else value for value in found], dtype=np.float64)
