"""Rates, means and before/after differences, each with its n and a 95% interval.

Examples that are not independent (the forms of one request, several answers to one prompt) share a *cluster*: intervals
then count clusters, not examples. The methods keep a width at 0/n and n/n, where a plain bootstrap or a normal
approximation has none.

- A rate: Wilson's score interval; with clusters, at the effective number of examples that the variance between clusters
  leaves, and with Student's t for few clusters (`rate_intervals`).
- A difference of rates: the two rates' intervals put together with their correlation (`rate_intervals`).
- A mean and a difference of means: the studentised bootstrap over clusters; with few clusters Student's t
  (`mean_intervals`).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy.special import stdtrit

from moe_ray.evaluation.mean_intervals import MeanInterval, mean_interval
from moe_ray.evaluation.rate_intervals import effective_number, rate_difference_interval, wilson_interval


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
    low, high = wilson_interval(hits / n, n)
    return Rate(value=hits / n, n=n, low=low, high=high)


def clustered_rate(hits: npt.ArrayLike, clusters: Sequence[Any] | npt.NDArray[Any]) -> Rate:
    """The share of true values, with an interval for examples that come in clusters.

    With one example a cluster the effective number of examples is the number of examples, and the interval is Wilson's.
    Where all values are alike there is no variance to tell how alike a cluster is: then each cluster counts once.

    Args:
        hits: (n,) bool.
        clusters: (n,) equal values on examples of one cluster.
    """
    values = np.asarray(hits, dtype=np.float64)
    if not len(values):
        return rate(0, 0)
    share = float(values.mean())
    # Answers to forms of one request tend to be alike, so n of them say less than n independent ones would: Wilson's formula
    # gets the number of independent examples that would say as much.
    low, high = wilson_interval(share, *effective_number(values, _numbered(clusters, len(values))))
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
    found, n = _interval(values, weights, clusters, seed)
    return Mean(value=found.value, n=n, low=found.low, high=found.high)


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
    # Two estimates from all clusters but one share almost all of them, and so differ C - 1 times less than single clusters
    # do. The factor C - 1 makes up for that.
    error = math.sqrt((num_clusters - 1) * float(np.mean(np.square(left_out - left_out.mean()))))
    # The error is itself an estimate from C numbers; with few of them Student's quantile is wider than the normal 1.96.
    half = float(stdtrit(num_clusters - 1, 0.975)) * error
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
    # The same examples are asked twice, so the two rates rise and fall together. The interval takes that into account;
    # that of two separate samples would be wider.
    if first.dtype == np.bool_ and second.dtype == np.bool_:
        rates = first.astype(np.float64), second.astype(np.float64)
        low, high = rate_difference_interval(*rates, _numbered(clusters, len(first)))
        return Difference(value=float(rates[1].mean()) - float(rates[0].mean()), n=len(first), low=low, high=high)
    # A mean of differences and not a difference of means: what an example adds to both sides cancels.
    found, n = _interval(second.astype(np.float64) - first, weights, clusters, seed)
    return Difference(value=found.value, n=n, low=found.low, high=found.high)


def _interval(values: npt.ArrayLike, weights: Any, clusters: Any, seed: int) -> tuple[MeanInterval, int]:
    values_N = np.asarray(values, dtype=np.float64)
    weights_N = np.ones(len(values_N)) if weights is None else np.asarray(weights, dtype=np.float64)
    return mean_interval(values_N, weights_N, _numbered(clusters, len(values_N)), seed), len(values_N)


def _numbered(clusters: Sequence[Any] | npt.NDArray[Any] | None, n: int) -> npt.NDArray[np.int64]:
    """(n,) the clusters, numbered from 0; None = every example its own."""
    if clusters is None:
        return np.arange(n)
    # Not by `np.unique`, which needs values that can be sorted.
    numbers: dict[Any, int] = {}
    return np.array([numbers.setdefault(cluster, len(numbers)) for cluster in clusters], dtype=np.int64)
