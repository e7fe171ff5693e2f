"""The score of every image of an evaluation in a run, kept with its samples, and the intervals that come of them.

scores.json is {"column", "captions": their hash, "prompt": [place of each image's prompt], "tag": [...], "score": [...],
"range": [low, high], or [] where the score has no bounds}.
"""

import math
from collections.abc import Mapping
from typing import Any

from flowtilt.estimate import EXACT, FEW, FEWEST, KINDS, UNKNOWN, Estimate
from flowtilt.report.numbers import number
from flowtilt.report.reading import Record, is_list_of
from flowtilt.rewards.about import about_column
from flowtilt.statistics import Bounds, bounds_within, paired, summary


def score_summary(images: Mapping[str, Any]) -> dict[str, Any]:
    """The same summary, to the bit, that `flowtilt evaluate` gives the same scores."""
    scores = _values(images)
    return summary(scores, images["prompt"], images["tag"], bounds=bounds_within(score_range(images), [scores]))


def read_image_scores(record: Record) -> Record | None:
    """The content of scores.json, none where any of it is odd."""
    prompts, tags, scores = (record.get(key) for key in ("prompt", "tag", "score"))
    if not (isinstance(prompts, list) and isinstance(tags, list) and isinstance(scores, list) and scores):
        return None
    if not (is_list_of(prompts, int) and is_list_of(tags, str) and len(prompts) == len(tags) == len(scores)):
        return None
    known = all(score is None or math.isfinite(number({"": score}, "")) for score in scores)
    fits = known and all(abs(prompt) < 2**53 for prompt in prompts)
    bounds = record.get("range", [])
    ranged = isinstance(bounds, list) and (not bounds or (len(bounds) == 2 and math.isfinite(sum(number({"": b}, "") for b in bounds))))
    texts = isinstance(record.get("column"), str) and isinstance(record.get("captions"), str)
    return record if fits and ranged and texts else None


def change(before: Record | None, after: Record | None) -> Estimate:
    """After minus before, image by image from the same noise, with its interval over prompts; of unknown interval without both."""
    if not before or not after or any(before[key] != after[key] for key in ("column", "captions", "prompt", "tag")):
        return Estimate(math.nan, kind=UNKNOWN)
    scores = _values(after), _values(before)
    return estimate_of(paired(*scores, after["prompt"], after["tag"], bounds=bounds_within(score_range(after), scores)))


def estimate_of(record: Record, prompts: int = 0) -> Estimate:
    """An estimate from its JSON, see `Estimate.json` and `statistics.summary`; what is odd is missing.

    The rule holds for every record: below 10 prompts, or where their number is not known, there is no interval.

    Args:
        prompts: how many there are where the record does not say.
    """
    mean, low, high = (number(record, key) for key in ("mean", "low", "high"))
    images, missing = (count(record, key) for key in ("images", "missing"))
    prompts = count(record, "prompts") or prompts
    kind = record.get("interval") if record.get("interval") in KINDS else ""
    found = Estimate(mean, low, high, str(kind), prompts, images, missing)
    if prompts >= FEWEST and found.has_interval and low <= high:
        return found
    why = FEW if 0 < prompts < FEWEST else kind if kind and kind != EXACT else UNKNOWN
    return found._replace(low=math.nan, high=math.nan, kind=str(why))


def tag_estimates(record: Record) -> dict[str, Estimate]:
    """The score of each tag of a logged evaluation, with its interval, which version 0.1.0 did not log."""
    logged, plain = record.get("estimate"), record.get("by_tag")
    of = logged.get("by_tag") if isinstance(logged, dict) else None
    known = {str(tag): estimate_of(value) for tag, value in of.items() if isinstance(value, dict)} if isinstance(of, dict) else {}
    means = {str(tag): number(plain, tag) for tag in plain} if isinstance(plain, dict) else {}
    found = {tag: Estimate(value, kind=UNKNOWN) for tag, value in means.items()} | known
    return {tag: estimate for tag, estimate in found.items() if estimate.known}


def count(record: Record, key: str) -> int:
    """A count of things, 0 where it is not known."""
    value = number(record, key)
    return int(value) if value > 0 else 0


def _values(images: Mapping[str, Any]) -> list[float]:
    return [math.nan if score is None else float(score) for score in images["score"]]


def score_range(images: Mapping[str, Any]) -> Bounds | None:
    """The range of the score in scores.json; where that lacks it (version 0.1.0), of the built-in reward of the column's name."""
    if "range" in images:
        given = images["range"]
        return (float(given[0]), float(given[1])) if given else None
    about = about_column(str(images.get("column")))
    return about.ranges(about.name).get(str(images.get("column"))) if about else None
