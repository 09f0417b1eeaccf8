"""The interval of a weighted mean over clusters: the studentised bootstrap, or Student's t where clusters are few.

Losses are skewed. The studentised bootstrap follows the skew, which an interval of one half-width on either side cannot.

Source: Efron & Tibshirani (1993), An Introduction to the Bootstrap, section 12.5.

Shape suffixes: N examples, G clusters, R resamples.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from scipy.special import stdtrit

Floats = npt.NDArray[np.float64]

_RESAMPLES = 1_000
_FEW_CLUSTERS = 10
"""Below this many, resamples repeat each other too much for their tails to say anything."""


class MeanInterval(NamedTuple):
    """A mean with the ends of its 95% interval; NaN where there are too few examples to say."""

    value: float
    low: float
    high: float


def mean_interval(values_N: Floats, weights_N: Floats, ids_N: npt.NDArray[np.int64], seed: int) -> MeanInterval:
    """The weighted mean and its interval.

    Args:
        values_N: numbers.
        weights_N: not negative.
        ids_N: clusters, numbered from 0.
        seed: of the resamples.
    """
    if not len(values_N) or not weights_N.sum():
        return MeanInterval(math.nan, math.nan, math.nan)
    totals_G: Floats = np.bincount(ids_N, values_N * weights_N).astype(np.float64)
    sizes_G: Floats = np.bincount(ids_N, weights_N).astype(np.float64)
    mean = float(totals_G.sum() / sizes_G.sum())
    if len(totals_G) < 2:
        return MeanInterval(mean, math.nan, math.nan)
    error = float(_standard_error(totals_G[None], sizes_G[None], np.array([mean]))[0])
    lowest, highest = _t_quantiles(totals_G, sizes_G, mean, seed)
    # The ends change sides: where t is large the estimate is too high, so the true mean lies below it.
    return MeanInterval(mean, mean - highest * error, mean - lowest * error)


def _t_quantiles(totals_G: Floats, sizes_G: Floats, mean: float, seed: int) -> tuple[float, float]:
    """The 2.5% and 97.5% quantiles of (mean - true mean) / standard error."""
    num_clusters = len(totals_G)
    wide = float(stdtrit(num_clusters - 1, 0.975))
    if num_clusters < _FEW_CLUSTERS:
        return -wide, wide
    # Whole clusters are drawn, since their members are not independent.
    drawn = np.random.default_rng(seed).integers(num_clusters, size=(_RESAMPLES, num_clusters))
    totals_RG, sizes_RG = totals_G[drawn], sizes_G[drawn]
    # A resample may hold clusters of weight 0 only; it has no mean.
    usable = sizes_RG.sum(axis=1) > 0
    totals_RG, sizes_RG = totals_RG[usable], sizes_RG[usable]
    means_R = totals_RG.sum(axis=1) / sizes_RG.sum(axis=1)
    errors_R = _standard_error(totals_RG, sizes_RG, means_R)
    # Where all clusters drawn have one value the error is 0 but for rounding, and t would be anything up to infinity.
    # Few such resamples can go; many mean that the values take too few levels for this method.
    spread = errors_R > 1e-12 * np.abs(totals_RG).max(initial=0.0)
    if spread.mean() < 0.99:
        return -wide, wide
    low, high = np.quantile((means_R[spread] - mean) / errors_R[spread], [0.025, 0.975])
    return float(low), float(high)


def _standard_error(totals_RG: Floats, sizes_RG: Floats, means_R: Floats) -> Floats:
    """(R,) cluster-robust standard error of each row's ratio of sums.

    A cluster's size is random as well as its total, so what varies is total - mean x size.

    Source: Cochran (1977), Sampling Techniques, chapter 6, the ratio estimate; G / (G - 1) as in a sample variance.
    """
    num_clusters = totals_RG.shape[1]
    residuals_RG = totals_RG - means_R[:, None] * sizes_RG
    variance_R = num_clusters / (num_clusters - 1) * np.square(residuals_RG).sum(axis=1) / sizes_RG.sum(axis=1) ** 2
    return np.asarray(np.sqrt(variance_R))
