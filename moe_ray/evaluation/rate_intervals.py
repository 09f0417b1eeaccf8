"""Intervals for rates and for differences of rates, of examples that come in clusters.

Both keep a width at 0/n and n/n, where the normal approximation has none.

Sources: Wilson (1927), score interval; Korn & Graubard (1998) and Franco et al. (2019) for clusters; Newcombe (1998,
Statistics in Medicine 17:2635) for differences.
"""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt
from scipy.special import stdtrit

Floats = npt.NDArray[np.float64]

Z_95 = 1.959963984540054


def wilson_interval(share: float, n: float, z: float = Z_95) -> tuple[float, float]:
    """The two shares p for which the observed one is just `z` standard errors of p away.

    Source: Wilson (1927). The standard error is that of p and not of the observed share, which is 0 at 0/n and n/n.

    Args:
        share: observed (0 to 1).
        n: examples, or what clustered ones are worth (`effective_number`).
        z: quantile; Student's where n was estimated.
    """
    z2 = z**2
    centre = (share + z2 / (2 * n)) / (1 + z2 / n)
    half = z * math.sqrt(share * (1 - share) / n + z2 / (4 * n * n)) / (1 + z2 / n)
    # At 0 and 1 one end is the share itself; rounding would leave it a hair on the wrong side.
    return max(0.0, min(share, centre - half)), min(1.0, max(share, centre + half))


def effective_number(values: Floats, ids: npt.NDArray[np.int64]) -> tuple[float, float]:
    """Independent examples that are worth as much as these clustered ones, and the quantile to use with them.

    That many independent examples would give the variance that is observed between clusters: n* = p (1 - p) / variance.

    Source: Korn & Graubard (1998), Survey Methodology 24:193; Franco et al. (2019) put n* into Wilson's interval.

    Args:
        values: (n,) 0 or 1.
        ids: (n,) clusters, numbered from 0.
    """
    n, num_clusters = len(values), int(ids.max()) + 1
    if num_clusters == n:
        return float(n), Z_95
    if num_clusters == 1:
        # Nothing tells how alike the members are; at worst they are one example said n times.
        return 1.0, Z_95
    # The variance rests on as many residuals as there are clusters, so few of them need Student's wider quantile.
    quantile = float(stdtrit(num_clusters - 1, 0.975))
    share = float(values.mean())
    totals = np.bincount(ids, values - share)
    variance = num_clusters / (num_clusters - 1) * float(totals @ totals) / n**2
    if share in (0.0, 1.0) or variance == 0:
        # No variance to divide by, and none would make n* infinite: the interval would shrink to a point.
        return float(num_clusters), quantile
    # By chance clusters may differ less than independent examples would; claiming more than n examples would be too sure.
    return min(float(n), max(1.0, share * (1 - share) / variance)), quantile


def rate_difference_interval(before: Floats, after: Floats, ids: npt.NDArray[np.int64]) -> tuple[float, float]:
    """The interval of after minus before: the two rates' own intervals, "squared and added" with their correlation.

    Source: Newcombe (1998), method 10, with the correlation of cluster totals where examples come in clusters.

    Args:
        before: (n,) 0 or 1.
        after: (n,) of the same examples.
        ids: (n,) clusters, numbered from 0.
    """
    share_before, share_after = float(before.mean()), float(after.mean())
    low_before, high_before = wilson_interval(share_before, *effective_number(before, ids))
    low_after, high_after = wilson_interval(share_after, *effective_number(after, ids))
    correlation = _correlation(before, after, ids)
    # The difference is least where the rate after is low and the rate before is high, and the other way round.
    down = _square_and_add(share_after - low_after, high_before - share_before, correlation)
    up = _square_and_add(high_after - share_after, share_before - low_before, correlation)
    value = share_after - share_before
    return max(-1.0, value - down), min(1.0, value + up)


def _square_and_add(left: float, right: float, correlation: float) -> float:
    # Of two equal arms at correlation 1 nothing is left; rounding may leave less than nothing.
    return math.sqrt(max(0.0, left**2 - 2 * correlation * left * right + right**2))


def _correlation(before: Floats, after: Floats, ids: npt.NDArray[np.int64]) -> float:
    """The correlation of the clusters' totals; a positive one is corrected downwards as in Newcombe's method 10."""
    left, right = (np.bincount(ids, values - values.mean()) for values in (before, after))
    size = math.sqrt(float(left @ left) * float(right @ right))
    if size == 0:
        # A rate of 0 or 1 varies with nothing.
        return 0.0
    product = float(left @ right)
    # Newcombe takes n / 2 from a d - b c of the paired 2 x 2 table, which is n times this product, so 1/2 from the product.
    # A correlation that is too large would make the interval too short: only a positive one is made smaller, and never
    # negative. A cluster of m examples may move by all m at once, hence the mean of m squared.
    correction = 0.5 * float(np.mean(np.square(np.bincount(ids))))
    return (max(0.0, product - correction) if product > 0 else product) / size
