"""How sure a mean score is: a bootstrap over prompts, the one rule for every interval that flowtilt shows.

N images lie in clusters (images of one prompt are alike, so a prompt counts as one observation) and strata
(tags: how many prompts each has is the benchmark's choice, not chance). A value that is NaN is missing and
left out; a cluster without any value is left out whole. Below 10 clusters there is no interval.

Of a stratum's K clusters each resample draws K - 1 with replacement, weighted K / (K - 1). Drawing K would give
the variance of the mean divided by K instead of K - 1, too narrow where tags have few prompts: Rao and Wu,
J. Am. Stat. Assoc. 83 (1988); Rao, Wu and Yue, Survey Methodology 18 (1992). The interval is that of the
resampled means' percentiles.

A stratum of one cluster cannot be resampled, and strata whose clusters are alike add no width. Where there is
a stratum of one cluster, or those that differ hold fewer than 10 clusters, all clusters are resampled as one stratum.
This is wider, because it includes the differences between tags (collapsed strata: Cochran, Sampling Techniques,
3rd ed., 5A.12). The mean over tags has no interval then.

Where the clusters of no stratum differ, every resample is the same and would give an interval without width, as
if nothing were uncertain. Then there is none, unless the scores' range [a, b] is known. Let p be the chance that
another cluster of a stratum scores as those did: that all K did had the chance p^K, so p is at least
P = ((1 - level) / 2)^(1 / K), the bound of Clopper and Pearson, Biometrika 26 (1934), and what scores otherwise
lies in [a, b]: the mean is at least c - (1 - P) (c - a) and at most c + (1 - P) (b - c). 20 of 20 prompts that
score 1 of [0, 1] give [0.832, 1]. In strata of weights w (their sum 1), K = min K_s / w_s: by the inequality of
the means, prod p_s^K_s <= (sum w_s p_s)^K.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from flowtilt.estimate import ALIKE, BOOTSTRAP, EXACT, FEW, FEWEST, NOTHING, THIN, Estimate

Array = NDArray[np.float64]
Whole = NDArray[np.int64]

DRAWS = 2**20
"""Clusters drawn at once, which bounds the memory."""

Bounds = tuple[float, float]
"""The lowest and the highest score that there can be."""


def bounds_within(bounds: Bounds | None, values: Sequence[ArrayLike]) -> Bounds | None:
    """The range that a score is said to have; none where any of the values is outside, as GenEval's with `compat` may be."""
    if bounds is None:
        return None
    known = np.concatenate([np.ravel(np.asarray(part, dtype=float)) for part in values]) if len(values) else np.zeros(0)
    known = known[~np.isnan(known)]
    return bounds if ((known >= bounds[0]) & (known <= bounds[1])).all() else None


def interval(
    values: ArrayLike,
    clusters: ArrayLike,
    strata: ArrayLike | None = None,
    *,
    resamples: int = 2000,
    seed: int = 0,
    level: float = 0.95,
    bounds: Bounds | None = None,
) -> tuple[float, float]:
    """(low, high) of the mean over images, (nan, nan) below 10 clusters, or where none differ and the range is not known.

    Args:
        values: [N], NaN where missing.
        clusters: [N] labels of any kind, equal for the images of one prompt.
        strata: [N] labels of any kind; none is one stratum.
        resamples: how many.
        seed: of the numpy Generator made for this call.
        level: in (0, 1).
        bounds: of the scores, where they are known; they give an interval also where no two clusters differ.

    Raises:
        ValueError: lengths differ, a value is infinite or out of bounds, or `level` or `resamples` makes no sense.
    """
    estimate = _bootstrap(values, clusters, strata, resamples, seed, level, bounds).overall()
    return estimate.low, estimate.high


def mean_of_strata(
    values: ArrayLike,
    clusters: ArrayLike,
    strata: ArrayLike,
    *,
    resamples: int = 2000,
    seed: int = 0,
    level: float = 0.95,
    bounds: Bounds | None = None,
) -> Estimate:
    """The mean over strata of each stratum's mean, GenEval's overall score, with its interval; see `interval`.

    A stratum without any value is left out. There is no interval where a stratum has one cluster, or where those
    that differ hold fewer than 10.
    """
    return _bootstrap(values, clusters, strata, resamples, seed, level, bounds).of_strata()


def summary(
    values: ArrayLike,
    clusters: ArrayLike,
    strata: ArrayLike | None = None,
    *,
    resamples: int = 2000,
    seed: int = 0,
    level: float = 0.95,
    bounds: Bounds | None = None,
) -> dict[str, Any]:
    """One column of an evaluation, ready for JSON: what is not known is None.

    {mean, low, high, images, missing, prompts}, where `missing` of all `images` have no score and `prompts` have one, and
    "interval" where it is not a bootstrap's or there is none, see `Estimate.kind`. Where at least two tags
    have a score, also `mean_of_tags` {mean, low, high} and `by_tag` {tag: {mean, low, high, images, missing, prompts}},
    tags in order of appearance; the empty tag means "none" and is not among them. All from the same resamples.

    Args and Raises: see `interval`.
    """
    resampled = _bootstrap(values, clusters, strata, resamples, seed, level, bounds)
    missing = np.isnan(np.asarray(values, dtype=float))
    overall = resampled.overall()
    found = overall.json() | {"images": len(missing), "missing": int(missing.sum()), "prompts": overall.prompts}
    known = {str(label): place for place, label in enumerate(resampled.labels) if str(label)}
    if strata is None or len(known) < 2:
        return found
    tags, by_tag = np.asarray(strata).astype(str), {}
    for tag in dict.fromkeys(tags[tags != ""].tolist()):
        mine = missing[tags == tag]
        estimate = resampled.of_stratum(known[tag]) if tag in known else NOTHING
        by_tag[tag] = estimate.json() | {"images": len(mine), "missing": int(mine.sum()), "prompts": estimate.prompts}
    return found | {"mean_of_tags": resampled.of_strata(list(known.values())).json(), "by_tag": by_tag}


def paired(
    tuned: ArrayLike,
    base: ArrayLike,
    clusters: ArrayLike,
    strata: ArrayLike | None = None,
    *,
    resamples: int = 2000,
    seed: int = 0,
    level: float = 0.95,
    bounds: Bounds | None = None,
) -> dict[str, Any]:
    """Tuned minus base, image by image, over the images where both have a score; ready for JSON.

    {mean, low, high, images, missing, prompts, wins, ties}: `missing` of all `images` lack one score or both; `wins` and
    `ties` are the shares, of the others, where tuned is higher and where both are equal. None where not known.

    Args:
        tuned, base: [N], of the same images (prompt and noise) in the same order; NaN where missing.
        bounds: of the scores; a difference is within their width.

    Other Args and Raises: see `interval`.
    """
    first, second = np.asarray(tuned, dtype=float), np.asarray(base, dtype=float)
    if first.shape != second.shape:
        raise ValueError(f"tuned and base must both be [N], got {list(first.shape)} and {list(second.shape)}")
    if np.isinf(first).any() or np.isinf(second).any():
        raise ValueError("values must be finite, or NaN where missing")
    difference = first - second
    known = ~np.isnan(difference)
    width = bounds[1] - bounds[0] if bounds else 0.0
    estimate = _bootstrap(difference, clusters, strata, resamples, seed, level, (-width, width) if bounds else None).overall()
    share = {"wins": difference[known] > 0, "ties": difference[known] == 0}
    counts = {"images": len(known), "missing": int((~known).sum()), "prompts": estimate.prompts}
    return estimate.json() | counts | {name: float(of.mean()) if len(of) else None for name, of in share.items()}


@dataclass(frozen=True)
class _Resampled:
    """Sums and counts of S strata, as they are and in R resamples; sums are of values minus `origin`."""

    level: float
    bounds: Bounds | None
    labels: NDArray[Any]  # [S]
    clusters: Whole  # [S] how many it has
    differ: NDArray[np.bool_]  # [S] whether two of them do
    origin: float
    sums: Array  # [1 + R, S], the first row as they are
    counts: Array  # [1 + R, S]
    whole: "_Resampled | None"  # all clusters as one stratum, where strata are not enough for the mean over images

    def overall(self) -> Estimate:
        if self.whole:
            return self.whole.overall()
        everywhere = list(range(len(self.labels)))
        return self._estimate(self.sums.sum(1), self.counts.sum(1), everywhere, self.counts[0])

    def of_stratum(self, place: int) -> Estimate:
        return self._estimate(self.sums[:, place], self.counts[:, place], [place], np.ones(1))

    def of_strata(self, places: list[int] | None = None) -> Estimate:
        """Mean over the strata at these places, all where none are given."""
        chosen = list(range(len(self.labels))) if places is None else places
        means = self.sums[:, chosen] / self.counts[:, chosen]
        return self._estimate(means.sum(1), np.full(len(means), float(len(chosen))), chosen, np.ones(len(chosen)))

    def _estimate(self, sums: Array, counts: Array, places: list[int], weights: Array) -> Estimate:
        """Of strata at `places` that count by `weights`."""
        if not counts[0]:
            return NOTHING
        means = self.origin + sums / counts
        mean, prompts = float(means[0]), int(self.clusters[places].sum())
        if prompts < FEWEST:
            return Estimate(mean, kind=FEW, prompts=prompts)
        if _thin(self.clusters[places], self.differ[places]):
            return Estimate(mean, kind=THIN, prompts=prompts)
        if not self.differ[places].any():
            low, high = self._of_alike(mean, places, weights)
            return Estimate(mean, low, high, EXACT if self.bounds else ALIKE, prompts)
        low, high = np.quantile(means[1:], [(1 - self.level) / 2, (1 + self.level) / 2])
        return Estimate(mean, float(low), float(high), BOOTSTRAP, prompts)

    def _of_alike(self, mean: float, places: list[int], weights: Array) -> Bounds:
        """What the number of clusters says where none differ; see the module's docstring."""
        if self.bounds is None:
            return math.nan, math.nan
        lowest, highest = self.bounds
        effective = float((self.clusters[places] * weights.sum() / weights).min())
        otherwise = 1 - ((1 - self.level) / 2) ** (1 / effective)
        scores = self.origin + self.sums[0, places] / self.counts[0, places]
        low, high = mean - otherwise * float(scores.max() - lowest), mean + otherwise * float(highest - scores.min())
        return max(low, lowest), min(high, highest)


def _thin(clusters: Whole, differ: NDArray[np.bool_]) -> bool:
    """Whether strata [S] of so many clusters are not enough for a bootstrap within them."""
    return bool(len(clusters) > 1 and ((clusters == 1).any() or 0 < clusters[differ].sum() < FEWEST))


def _bootstrap(
    values: ArrayLike,
    clusters: ArrayLike,
    strata: ArrayLike | None,
    resamples: int,
    seed: int,
    level: float,
    bounds: Bounds | None,
) -> _Resampled:
    scores, prompts = np.asarray(values, dtype=float), np.asarray(clusters)
    tags = np.zeros(len(scores), dtype=int) if strata is None else np.asarray(strata)
    if scores.ndim != 1 or not scores.shape == prompts.shape == tags.shape:
        raise ValueError(f"values, clusters and strata must all be [N], got {[list(a.shape) for a in (scores, prompts, tags)]}")
    if np.isinf(scores).any():
        raise ValueError("values must be finite, or NaN where missing")
    if resamples < 1:
        raise ValueError(f"resamples {resamples} is less than 1")
    if not 0 < level < 1:
        raise ValueError(f"level {level} is not in (0, 1)")
    known = ~np.isnan(scores)
    if bounds and not ((scores[known] >= bounds[0]) & (scores[known] <= bounds[1])).all():
        raise ValueError(f"values must be in {list(bounds)}")
    labels, tag = np.unique(tags[known], return_inverse=True)
    # measured from one of themselves, equal values have equal means to the last bit
    origin = float(scores[known].min()) if known.any() else 0.0
    sums, counts, stratum = _cluster_sums(scores[known] - origin, prompts[known], tag)

    found = _resample(labels, sums, counts, stratum, origin, resamples, seed, level, bounds)
    if not _thin(found.clusters, found.differ):
        return found
    together = _resample(np.zeros(1, dtype=int), sums, counts, np.zeros_like(stratum), origin, resamples, seed, level, bounds)
    return replace(found, whole=together)


def _resample(
    labels: NDArray[Any],
    sums: Array,
    counts: Array,
    stratum: Whole,
    origin: float,
    resamples: int,
    seed: int,
    level: float,
    bounds: Bounds | None,
) -> _Resampled:
    """Resamples of K clusters within the strata that `stratum` [K] puts them in."""
    generator = np.random.default_rng(seed)
    shape = (1 + resamples, len(labels))
    all_sums, all_counts = np.zeros(shape), np.zeros(shape)
    number, differ = np.zeros(len(labels), dtype=np.int64), np.zeros(len(labels), dtype=bool)
    for place in range(len(labels)):
        members = np.flatnonzero(stratum == place)
        number[place], differ[place] = len(members), _differ(sums[members] / counts[members])
        all_sums[0, place], all_counts[0, place] = sums[members].sum(), counts[members].sum()
        resampled = (
            _draw_resample(sums[members], counts[members], resamples, generator)
            if len(members) > 1
            else (all_sums[0, place], all_counts[0, place])
        )
        all_sums[1:, place], all_counts[1:, place] = resampled
    return _Resampled(level, bounds, labels, number, differ, origin, all_sums, all_counts, None)


def _differ(means: Array) -> bool:
    """Whether two of them do by more than rounding."""
    return bool(np.ptp(means) > 1e-12 * np.abs(means).max())


def _cluster_sums(values: Array, prompts: NDArray[Any], tag: Whole) -> tuple[Array, Array, Whole]:
    """Sum and number of values of each cluster, and its stratum, [K]; a label in two strata is two clusters."""
    names, prompt = np.unique(prompts, return_inverse=True)
    cluster = tag * len(names) + prompt
    # rounding depends on the order of a sum: the order of the rows must not
    order = np.lexsort((values, cluster))
    found, place = np.unique(cluster[order], return_inverse=True)
    sums = np.bincount(place, values[order], minlength=len(found)).astype(float)
    return sums, np.bincount(place, minlength=len(found)).astype(float), found // max(len(names), 1)


def _draw_resample(sums: Array, counts: Array, resamples: int, generator: np.random.Generator) -> tuple[Array, Array]:
    """Sums and counts [R] of resamples of one stratum's K > 1 clusters."""
    size, several = len(sums), max(1, DRAWS // len(sums))
    found = np.zeros((2, resamples))
    for start in range(0, resamples, several):
        rows = min(several, resamples - start)
        resampled = generator.integers(size, size=(rows, size - 1))
        found[0, start : start + rows] = sums[resampled].sum(1)
        found[1, start : start + rows] = counts[resampled].sum(1)
    found *= size / (size - 1)
    return found[0], found[1]
