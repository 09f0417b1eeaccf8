"""How sure a batch's risk differences are: false discovery rate, power, intervals and stability, prompts as the unit.

The tests themselves are in `permutation_test`.

Shape suffixes: N examples, X experts of all layers, C clusters (prompts or pairs), R resamples.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy.special import stdtrit

from moe_ray.identification.permutation_test import PermutationTest
from moe_ray.identification.relabelling_counts import one_blas_thread
from moe_ray.identification.risk import Floats
from moe_ray.identification.samples import Samples

_SAME = 1e-12
"""Differences of rates closer than this are equal: rounding makes up to 1e-15 of it, unequal counts at least 1e-10."""


def q_values(p_X: Floats) -> Floats:
    """Smallest false discovery rate at which each expert would be called.

    Source: Benjamini & Hochberg (1995).
    """
    order = np.argsort(p_X)
    q_X = np.empty(len(p_X))
    # The k-th smallest p bounds the rate at p * X / k; a larger p may give a smaller bound, which holds for it too.
    bounds = np.asarray(p_X, dtype=np.float64)[order] * (len(p_X) / np.arange(1, len(p_X) + 1))
    q_X[order] = np.minimum(1.0, np.minimum.accumulate(bounds[::-1])[::-1])
    return q_X


def smallest_effect(samples: Samples, test: PermutationTest, *, alpha: float = 0.05, most: float = 1.0) -> Floats:
    """(X,) the smallest difference that the batch could have certified, corrected for all experts.

    The prompts' own variation about their label's rate is kept, which is what the standard error is of; the difference is
    replaced by another, and the value that the largest of all experts stays below in all but a share `alpha` of the
    relabellings is taken as it is. Infinite where no difference of at most `most`, the largest there can be, is enough; NaN
    for an expert that no token was routed to.
    """
    error_X, bar = standard_error(samples), _bar(test.maxima_P, alpha)
    effect_X = np.multiply(bar, error_X, out=np.full_like(error_X, np.inf), where=(error_X > 0) | np.isfinite(bar))
    if test.maxima_about_one_rate_P is not None:
        effect_X = np.maximum(effect_X, _effect_about_one_rate(samples, _bar(test.maxima_about_one_rate_P, alpha)))
    effect_X = np.where(effect_X > most, np.inf, effect_X)
    return np.asarray(np.where(samples.values_NX.any(axis=0), effect_X, np.nan))


def _bar(maxima_P: Floats, alpha: float) -> float:
    """The largest value of a relabelling that a significant one has to exceed."""
    # As many maxima as alpha allows may be as large as the observed value, the observed labelling's own among them, so it
    # has to exceed the last of those. With fewer than 1 / alpha relabellings none is allowed, and nothing is certified.
    allowed = int(alpha * len(maxima_P))
    return float(maxima_P[-allowed]) if allowed else np.inf


def _effect_about_one_rate(samples: Samples, bar: float) -> Floats:
    """(X,) the smallest difference whose quotient by the standard error about one rate is the bar."""
    share = samples.sizes_N[samples.is_unsafe_N].sum() / samples.sizes_N.sum()
    shift_N1 = (samples.sizes_N * (samples.is_unsafe_N - share))[:, None]
    rest_CX = _contributions(samples, samples.centred() - samples.difference() * shift_N1)
    shift_C1 = _contributions(samples, shift_N1)
    within_X, crossed_X = np.square(rest_CX).sum(axis=0), (rest_CX * shift_C1).sum(axis=0)
    # A larger effect also has a larger error, as it is centred away with both labels pooled. So this solves
    # effect = bar * sqrt(within + 2 crossed effect + shift^2 effect^2); where the last term wins, no effect is enough.
    lead = 1 - bar**2 * float(np.square(shift_C1).sum())
    if not lead > 0:
        return np.full(len(within_X), np.inf)
    half_X = bar**2 * crossed_X
    return np.asarray((half_X + np.sqrt(half_X**2 + lead * bar**2 * within_X)) / lead)


def standard_error(samples: Samples) -> Floats:
    """(X,) of the difference, as the permutation test divides by it: prompts (or pairs) about their label's own rate."""
    kinds_C, sums_CX = _clusters(samples).kinds_C, _contributions(samples, samples.residuals())
    sizes = np.bincount(kinds_C)
    factors = sizes / np.maximum(sizes - 1, 1)
    return np.asarray(np.sqrt(factors[kinds_C] @ np.square(sums_CX)))


@dataclass(frozen=True)
class _Clusters:
    """Examples that are resampled together; kinds: 0 pairs, 1 single safe examples, 2 single unsafe ones."""

    cluster_N: npt.NDArray[np.int64]
    kinds_C: npt.NDArray[np.int64]

    def add_up(self, values_NX: Floats) -> Floats:
        """(C, X) sums over each cluster's examples."""
        order = np.argsort(self.cluster_N, kind="stable")
        starts = np.flatnonzero(np.diff(self.cluster_N[order], prepend=-1))
        return np.asarray(np.add.reduceat(values_NX[order], starts, axis=0))


def _clusters(samples: Samples) -> _Clusters:
    # Single examples get negative numbers of their own, so that none falls together with a pair's.
    singles_N = samples.groups_N == 0
    names_N = np.where(singles_N, -1 - np.arange(len(singles_N)), samples.groups_N)
    names_C, firsts_C, cluster_N = np.unique(names_N, return_index=True, return_inverse=True)
    return _Clusters(cluster_N, np.where(names_C > 0, 0, 1 + samples.is_unsafe_N[firsts_C]))


def _contributions(samples: Samples, residuals_NX: Floats) -> Floats:
    """(C, X) what each prompt or pair adds to the difference of the residuals' rates."""
    signs_N = np.where(samples.is_unsafe_N, 1, -1)
    return _clusters(samples).add_up(residuals_NX * (signs_N / _totals(samples))[:, None])


def _totals(samples: Samples) -> Floats:
    """(N,) the summed sizes of each example's label."""
    unsafe_N = samples.is_unsafe_N
    return np.asarray(np.where(unsafe_N, samples.sizes_N[unsafe_N].sum(), samples.sizes_N[~unsafe_N].sum()))


def cluster_interval(samples: Samples, *, level: float = 0.95, most: float = 1.0) -> tuple[Floats, Floats]:
    """(X,) lower and upper end of the difference's interval, with prompts (or pairs) as clusters, within -most to most.

    Linearised variance of the two ratios and Student's t with Satterthwaite's degrees of freedom, of which a label has fewer
    where a few of its prompts hold most of its tokens. With one cluster of a kind nothing is known and the interval is all
    of that. An expert that does not vary has an interval of width 0.

    Source: Cochran (1977), Sampling Techniques, 6.3; Satterthwaite (1946); degrees after Bell & McCaffrey (2002).
    """
    clusters = _clusters(samples)
    sums_CX = _contributions(samples, samples.residuals())
    shares_C = clusters.add_up((samples.sizes_N / _totals(samples))[:, None])[:, 0]
    variance_X, weighted_X = np.zeros(sums_CX.shape[1]), np.zeros(sums_CX.shape[1])
    for kind in np.unique(clusters.kinds_C):
        # By kind, since a safe and an unsafe example are not draws of one population; pairs hold one of each, whose common
        # part cancels in their contribution.
        is_kind_C = clusters.kinds_C == kind
        contributions_CX = sums_CX[is_kind_C]
        if len(contributions_CX) == 1:
            return np.full(len(variance_X), -most), np.full(len(variance_X), most)
        part_X = len(contributions_CX) * contributions_CX.var(axis=0, ddof=1)
        variance_X += part_X
        weighted_X += part_X**2 / _degrees(shares_C[is_kind_C])
    # With eight pairs a normal quantile would be a sixth too small. Where nothing varies any degrees will do: the width
    # is 0, and 0 / 0 degrees would make it NaN.
    degrees_X = np.divide(variance_X**2, weighted_X, out=np.ones_like(variance_X), where=weighted_X > 0)
    half_X = stdtrit(degrees_X, (1 + level) / 2) * np.sqrt(variance_X)
    difference_X = samples.difference()
    return np.maximum(difference_X - half_X, -most), np.minimum(difference_X + half_X, most)


def _degrees(shares_C: Floats) -> float:
    """Degrees of freedom of a variance between clusters whose rates vary alike.

    One less than their number if all are of one size, fewer if some hold most of the tokens.

    Args:
        shares_C: (C,) what part of the tokens each holds, up to a factor.
    """
    shares_C = shares_C / shares_C.sum()
    # A residual is a cluster's deviation, less its share of the sum of all; deviations are as large as the sizes.
    spread_CC = (np.eye(len(shares_C)) - shares_C[:, None]) * shares_C
    covariance_CC = spread_CC @ spread_CC.T
    return float(np.trace(covariance_CC) ** 2 / np.square(covariance_CC).sum())


def selection_stability(
    samples: Samples,
    *,
    threshold: float,
    top_k: int,
    resamples: int = 200,
    seed: int = 0,
    is_relative: bool = False,
) -> Floats:
    """(X,) share of bootstrap resamples in which an expert is above `threshold` and among the `top_k` largest.

    Where it `is_relative`, the threshold is a share of the resample's largest difference, and of 0 if none is above it.

    Prompts are resampled within their label, pairs as pairs. Near 1 the selection does not hang on single prompts.

    Source: the idea of Meinshausen & Buhlmann (2010), Stability Selection, with resamples of full size.
    """
    clusters, rng = _clusters(samples), np.random.default_rng(seed)
    draws_RC = np.empty((resamples, len(clusters.kinds_C)))
    for kind in np.unique(clusters.kinds_C):
        # Within a kind: drawn from all clusters together, a resample could be left without safe or unsafe prompts.
        is_kind_C = clusters.kinds_C == kind
        num = int(is_kind_C.sum())
        draws_RC[:, is_kind_C] = rng.multinomial(num, np.full(num, 1 / num), size=resamples)
    times_RN = draws_RC[:, clusters.cluster_N]
    weights_RN = np.zeros_like(times_RN)
    for rows, sign in ((samples.is_unsafe_N, 1), (~samples.is_unsafe_N, -1)):
        weights_RN[:, rows] = sign * times_RN[:, rows] / (times_RN[:, rows] @ samples.sizes_N[rows])[:, None]
    # Float64, so that equal differences come out closer than _SAME on every processor, and different ones further apart.
    with one_blas_thread():
        difference_RX = weights_RN @ samples.values_NX.astype(np.float64)
    bars_R1: Floats | float = threshold
    if is_relative:
        bars_R1 = threshold * np.maximum(difference_RX.max(axis=1, keepdims=True), 0.0)
    selected_RX = difference_RX > bars_R1 + _SAME
    for selected_X, difference_X in zip(selected_RX, difference_RX, strict=True):
        above = np.flatnonzero(selected_X)
        if len(above) > top_k:
            selected_X[above] = _largest(difference_X[above], top_k)
    return np.asarray(np.count_nonzero(selected_RX, axis=0) / resamples)


def _largest(values_X: Floats, top_k: int) -> npt.NDArray[np.bool_]:
    """(X,) bool: the `top_k` largest of more values than that; of those that tie for the last places, the first."""
    position = len(values_X) - top_k
    last = np.partition(values_X, position)[position]
    largest_X = values_X >= last - _SAME
    if np.count_nonzero(largest_X) > top_k:
        # Values that rounding has split are one tie. Taken as they are, which of two equal experts is selected would hang on
        # the processor, and there could be more than top_k or fewer.
        tied_X = np.abs(values_X - last) <= _SAME
        above_X = largest_X & ~tied_X
        largest_X = above_X | (tied_X & (np.cumsum(tied_X) <= top_k - above_X.sum()))
    return np.asarray(largest_X)
