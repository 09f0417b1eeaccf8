"""Rates, means and before/after differences, each with its n and a 95% interval.

Examples that are not independent (the forms of one request, several answers to one prompt) share a *cluster*: intervals
then count clusters, not examples. The methods keep a width at 0/n and n/n, where a plain bootstrap or a normal
approximation has none.

- A rate: Wilson's score interval; with clusters, at the effective number of examples that the variance between clusters
  leaves, and with Student's t for few clusters (Wilson 1927; Korn & Graubard 1998; Franco et al. 2019).
- A difference of rates: the two rates' intervals put together with their correlation, "square and add"
  (Newcombe 1998, Statistics in Medicine 17:2635, method 10; with clusters, the correlation of cluster totals).
- A mean and a difference of means: the studentised bootstrap over clusters, which follows the skew that losses have
  (Efron & Tibshirani 1993, section 12.5); with few clusters Student's t.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy.stats import t as student_t

Floats = npt.NDArray[np.float64]

_Z_95 = 1.959963984540054

_RESAMPLES = 1_000

_FEW_CLUSTERS = 10


@dataclass(frozen=True, kw_only=True)
class _Estimate:
    value: float
    n: int
    low: float
    high: float

    def as_dict(self) -> dict[str, float | int | None]:
        """Plain values; a NaN becomes None."""
        return {name: None if math.isnan(value) else value for name, value in vars(self).items()}


@dataclass(frozen=True, kw_only=True)
class Rate(_Estimate):
    """A share of examples.

    Attributes:
        value: 0 to 1; NaN when n is 0.
        n: examples.
        low: lower end of the 95% interval.
        high: its upper end.
    """


@dataclass(frozen=True, kw_only=True)
class Mean(_Estimate):
    """A weighted mean over examples.

    Attributes:
        value: in the values' unit; NaN when n is 0.
        n: examples.
        low: lower end of the 95% interval; NaN with fewer than two clusters.
        high: its upper end.
    """


@dataclass(frozen=True, kw_only=True)
class Difference(_Estimate):
    """After minus before, on the same examples.

    Attributes:
        value: in the values' unit, for rates -1 to 1; NaN when n is 0.
        n: examples, each counted once.
        low: lower end of the 95% interval; NaN for means with fewer than two clusters.
        high: its upper end.
    """


def rate(hits: int, n: int) -> Rate:
    """`hits / n` of independent examples with its 95% interval.

    Source: Wilson (1927), score interval.
    """
    if n == 0:
        return Rate(value=math.nan, n=0, low=math.nan, high=math.nan)
    low, high = _wilson(hits / n, n, _Z_95)
    return Rate(value=hits / n, n=n, low=low, high=high)


def clustered_rate(hits: npt.ArrayLike, clusters: Sequence[Any] | npt.NDArray[Any]) -> Rate:
    """The share of true values, with an interval for examples that come in clusters.

    With one example a cluster the effective number of examples is the number of examples, and the interval is Wilson's.
    Where all values are alike there is no variance to tell how alike a cluster is: then each cluster counts once.

    Args:
        hits: (n,) bool.
        clusters: (n,) equal values on examples of one cluster.
    """
    values, ids = np.asarray(hits, dtype=np.float64), _numbered(clusters)
    if not len(values):
        return rate(0, 0)
    share = float(values.mean())
    low, high = _wilson(share, *_effective_number(values, ids))
    return Rate(value=share, n=len(values), low=low, high=high)


def clustered_mean(
    values: npt.ArrayLike,
    *,
    weights: npt.ArrayLike | None = None,
    clusters: Sequence[Any] | npt.NDArray[Any] | None = None,
    seed: int = 0,
) -> Mean:
    """The (weighted) mean, with an interval over clusters.

    Args:
        values: (n,) numbers, such as nats per token.
        weights: (n,) such as tokens; None = all alike.
        clusters: (n,) equal values on examples of one cluster; None = every example its own.
        seed: of the bootstrap.
    """
    value, n, low, high = _mean_interval(values, weights, clusters, seed)
    return Mean(value=value, n=n, low=low, high=high)


def jackknife(value: float, without: npt.ArrayLike, *, n: int) -> Mean:
    """An estimate that is a smooth function of means, with the jackknife's interval.

    Args:
        value: the estimate from all clusters.
        without: (C,) the estimate without each cluster in turn.
        n: examples.

    Source: Efron & Tibshirani (1993), An Introduction to the Bootstrap, chapter 11; Student's t with C - 1.
    """
    left_out = np.asarray(without, dtype=np.float64)
    num_clusters = len(left_out)
    if num_clusters < 2:
        return Mean(value=value, n=n, low=math.nan, high=math.nan)
    error = math.sqrt((num_clusters - 1) * float(np.mean(np.square(left_out - left_out.mean()))))
    half = float(student_t.ppf(0.975, num_clusters - 1)) * error
    return Mean(value=value, n=n, low=value - half, high=value + half)


def paired_difference(
    before: npt.ArrayLike,
    after: npt.ArrayLike,
    *,
    clusters: Sequence[Any] | npt.NDArray[Any] | None = None,
    weights: npt.ArrayLike | None = None,
    seed: int = 0,
) -> Difference:
    """After minus before on the same examples: of rates where the values are bool, else of (weighted) means.

    Args:
        before: (n,) bool or numbers, one per example.
        after: (n,) of the same examples in the same order.
        clusters: (n,) equal values on examples of one cluster; None = every example its own.
        weights: (n,) for numbers only, such as tokens; None = all alike.
        seed: of the bootstrap, for numbers only.

    Raises:
        ValueError: lengths differ.
    """
    first, second = np.asarray(before), np.asarray(after)
    if first.shape != second.shape or first.ndim != 1:
        raise ValueError(f"paired values: got shapes {first.shape} and {second.shape}, expected two equal lengths")
    if not len(first):
        return Difference(value=math.nan, n=0, low=math.nan, high=math.nan)
    if first.dtype == np.bool_ and second.dtype == np.bool_:
        return _rate_difference(first.astype(np.float64), second.astype(np.float64), clusters)
    value, n, low, high = _mean_interval(second.astype(np.float64) - first, weights, clusters, seed)
    return Difference(value=value, n=n, low=low, high=high)


def _rate_difference(before: Floats, after: Floats, clusters: Any) -> Difference:
    ids = np.arange(len(before)) if clusters is None else _numbered(clusters)
    share_before, share_after = float(before.mean()), float(after.mean())
    low_before, high_before = _wilson(share_before, *_effective_number(before, ids))
    low_after, high_after = _wilson(share_after, *_effective_number(after, ids))
    correlation = _correlation(before, after, ids)
    down = _square_and_add(share_after - low_after, high_before - share_before, correlation)
    up = _square_and_add(high_after - share_after, share_before - low_before, correlation)
    value = share_after - share_before
    return Difference(value=value, n=len(before), low=max(-1.0, value - down), high=min(1.0, value + up))


def _square_and_add(left: float, right: float, correlation: float) -> float:
    return math.sqrt(max(0.0, left**2 - 2 * correlation * left * right + right**2))


def _correlation(before: Floats, after: Floats, ids: npt.NDArray[np.int64]) -> float:
    """The correlation of the clusters' totals; a positive one is corrected downwards as in Newcombe's method 10."""
    left, right = (np.bincount(ids, values - values.mean()) for values in (before, after))
    size = math.sqrt(float(left @ left) * float(right @ right))
    if size == 0:
        return 0.0
    product = float(left @ right)
    correction = 0.5 * float(np.mean(np.square(np.bincount(ids))))
    return (max(0.0, product - correction) if product > 0 else product) / size


def _wilson(share: float, n: float, z: float) -> tuple[float, float]:
    z2 = z**2
    centre = (share + z2 / (2 * n)) / (1 + z2 / n)
    half = z * math.sqrt(share * (1 - share) / n + z2 / (4 * n * n)) / (1 + z2 / n)
    return max(0.0, min(share, centre - half)), min(1.0, max(share, centre + half))


def _effective_number(values: Floats, ids: npt.NDArray[np.int64]) -> tuple[float, float]:
    """Independent examples that are worth as much as these, and the quantile to use with them.

    Never more than there are examples.
    """
    n, num_clusters = len(values), int(ids.max()) + 1
    if num_clusters == n:
        return float(n), _Z_95
    if num_clusters == 1:
        return 1.0, _Z_95
    quantile = float(student_t.ppf(0.975, num_clusters - 1))
    share = float(values.mean())
    totals = np.bincount(ids, values - share)
    variance = num_clusters / (num_clusters - 1) * float(totals @ totals) / n**2
    if share in (0.0, 1.0) or variance == 0:
        return float(num_clusters), quantile
    return min(float(n), max(1.0, share * (1 - share) / variance)), quantile


def _mean_interval(values: npt.ArrayLike, weights: Any, clusters: Any, seed: int) -> tuple[float, int, float, float]:
    values_N = np.asarray(values, dtype=np.float64)
    weights_N = np.ones(len(values_N)) if weights is None else np.asarray(weights, dtype=np.float64)
    if not len(values_N) or not weights_N.sum():
        return math.nan, len(values_N), math.nan, math.nan
    ids = np.arange(len(values_N)) if clusters is None else _numbered(clusters)
    totals_G: Floats = np.bincount(ids, values_N * weights_N).astype(np.float64)
    sizes_G: Floats = np.bincount(ids, weights_N).astype(np.float64)
    mean = float(totals_G.sum() / sizes_G.sum())
    if len(totals_G) < 2:
        return mean, len(values_N), math.nan, math.nan
    error = float(_standard_error(totals_G[None], sizes_G[None], np.array([mean]))[0])
    lowest, highest = _t_quantiles(totals_G, sizes_G, mean, seed)
    return mean, len(values_N), mean - highest * error, mean - lowest * error


def _t_quantiles(totals_G: Floats, sizes_G: Floats, mean: float, seed: int) -> tuple[float, float]:
    """The 2.5% and 97.5% quantiles of (mean - true mean) / standard error."""
    num_clusters = len(totals_G)
    wide = float(student_t.ppf(0.975, num_clusters - 1))
    if num_clusters < _FEW_CLUSTERS:
        return -wide, wide
    drawn = np.random.default_rng(seed).integers(num_clusters, size=(_RESAMPLES, num_clusters))
    totals_RG, sizes_RG = totals_G[drawn], sizes_G[drawn]
    usable = sizes_RG.sum(axis=1) > 0
    totals_RG, sizes_RG = totals_RG[usable], sizes_RG[usable]
    means_R = totals_RG.sum(axis=1) / sizes_RG.sum(axis=1)
    errors_R = _standard_error(totals_RG, sizes_RG, means_R)
    spread = errors_R > 1e-12 * np.abs(totals_RG).max(initial=0.0)
    if spread.mean() < 0.99:
        return -wide, wide
    low, high = np.quantile((means_R[spread] - mean) / errors_R[spread], [0.025, 0.975])
    return float(low), float(high)


def _standard_error(totals_RG: Floats, sizes_RG: Floats, means_R: Floats) -> Floats:
    """(R,) cluster-robust standard error of each row's ratio of sums."""
    num_clusters = totals_RG.shape[1]
    residuals_RG = totals_RG - means_R[:, None] * sizes_RG
    variance_R = num_clusters / (num_clusters - 1) * np.square(residuals_RG).sum(axis=1) / sizes_RG.sum(axis=1) ** 2
    return np.asarray(np.sqrt(variance_R))


def _numbered(clusters: Sequence[Any] | npt.NDArray[Any]) -> npt.NDArray[np.int64]:
    """(n,) the clusters, numbered from 0."""
    numbers: dict[Any, int] = {}
    return np.array([numbers.setdefault(cluster, len(numbers)) for cluster in clusters], dtype=np.int64)
