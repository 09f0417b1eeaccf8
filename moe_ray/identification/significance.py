"""How sure a batch's risk differences are: false discovery rate, power, intervals and stability, prompts as the unit.

The tests themselves are in `permutation_test`.

Shape suffixes: N examples, X experts of all layers, C clusters (prompts or pairs), R resamples.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy.special import stdtrit

from moe_ray.identification.permutation_test import PermutationTest, Reals, Samples, product
from moe_ray.identification.risk import Floats

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


def smallest_effect(samples: Samples, test: PermutationTest, *, alpha: float = 0.05) -> Floats:
    """(X,) the smallest risk difference that the batch could have certified, corrected for all experts.

    The prompts' own variation is kept, the observed difference is replaced by another, and the value that the largest of
    all experts stays below in all but a share `alpha` of the relabellings is taken as it is. Infinite where no
    difference of at most 1 is enough; NaN for an expert that no token was routed to.
    """
    # As many maxima as alpha allows may be as large as the observed value, the observed labelling's own among them, so it
    # has to exceed the last of those. With fewer than 1 / alpha relabellings none is allowed, and nothing is certified.
    allowed = int(alpha * len(test.maxima_P))
    bar = float(test.maxima_P[-allowed]) if allowed else np.inf
    share = samples.sizes_N[samples.is_unsafe_N].sum() / samples.sizes_N.sum()
    shift_N1 = (samples.sizes_N * (samples.is_unsafe_N - share))[:, None]
    rest_CX = _contributions(samples, samples.centred() - samples.difference() * shift_N1)
    shift_C1 = _contributions(samples, shift_N1)
    within_X, crossed_X = np.square(rest_CX).sum(axis=0), (rest_CX * shift_C1).sum(axis=0)
    # A larger effect also has a larger error under the null, as it is centred away with both labels pooled. So this solves
    # effect = bar * sqrt(within + 2 crossed effect + shift^2 effect^2); where the last term wins, no effect is enough.
    lead = 1 - bar**2 * float(np.square(shift_C1).sum())
    if lead > 0:
        half_X = bar**2 * crossed_X
        effect_X = (half_X + np.sqrt(half_X**2 + lead * bar**2 * within_X)) / lead
    else:
        effect_X = np.full(len(within_X), np.inf)
    effect_X = np.where(effect_X > 1, np.inf, effect_X)
    return np.asarray(np.where(samples.values_NX.sum(axis=0) > 0, effect_X, np.nan))


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
    sizes_N = np.where(samples.is_unsafe_N, 1, -1) * np.where(
        samples.is_unsafe_N, samples.sizes_N[samples.is_unsafe_N].sum(), samples.sizes_N[~samples.is_unsafe_N].sum()
    )
    return _clusters(samples).add_up(residuals_NX / sizes_N[:, None])


def cluster_interval(samples: Samples, *, level: float = 0.95) -> tuple[Floats, Floats]:
    """(X,) lower and upper end of the difference's interval, with prompts (or pairs) as clusters, within -1 to 1.

    Linearised variance of the two ratios and Student's t with Satterthwaite's degrees of freedom. With one cluster of a
    kind nothing is known and the interval is -1 to 1. An expert that does not vary has an interval of width 0.

    Source: Cochran (1977), Sampling Techniques, 6.3; Satterthwaite (1946).
    """
    clusters = _clusters(samples)
    residuals_NX = np.empty_like(samples.values_NX)
    for rows in (samples.is_unsafe_N, ~samples.is_unsafe_N):
        rate_X = samples.values_NX[rows].sum(axis=0) / samples.sizes_N[rows].sum()
        residuals_NX[rows] = samples.values_NX[rows] - samples.sizes_N[rows, None] * rate_X
    sums_CX = _contributions(samples, residuals_NX)
    variance_X, weighted_X = np.zeros(sums_CX.shape[1]), np.zeros(sums_CX.shape[1])
    for kind in np.unique(clusters.kinds_C):
        # By kind, since a safe and an unsafe example are not draws of one population; pairs hold one of each, whose common
        # part cancels in their contribution.
        contributions_CX = sums_CX[clusters.kinds_C == kind]
        if len(contributions_CX) == 1:
            return np.full(len(variance_X), -1.0), np.full(len(variance_X), 1.0)
        part_X = len(contributions_CX) * contributions_CX.var(axis=0, ddof=1)
        variance_X += part_X
        weighted_X += part_X**2 / (len(contributions_CX) - 1)
    # With eight pairs a normal quantile would be a sixth too small. Where nothing varies any degrees will do: the width
    # is 0, and 0 / 0 degrees would make it NaN.
    degrees_X = np.divide(variance_X**2, weighted_X, out=np.ones_like(variance_X), where=weighted_X > 0)
    half_X = stdtrit(degrees_X, (1 + level) / 2) * np.sqrt(variance_X)
    difference_X = samples.difference()
    return np.maximum(difference_X - half_X, -1.0), np.minimum(difference_X + half_X, 1.0)


def selection_stability(
    samples: Samples, *, threshold: float, top_k: int, resamples: int = 200, seed: int = 0
) -> Floats:
    """(X,) share of bootstrap resamples in which an expert is above `threshold` and among the `top_k` largest.

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
    difference_RX = product(weights_RN, samples.values_NX.astype(np.float64))
    selected_RX = difference_RX > threshold + _SAME
    if top_k < difference_RX.shape[1]:
        selected_RX &= _largest(difference_RX, top_k)
    return np.asarray(selected_RX.mean(axis=0))


def _largest(values_RX: Reals, top_k: int) -> npt.NDArray[np.bool_]:
    """(R, X) bool: the `top_k` largest of each row; of those that tie for the last places, the first in the row."""
    position = values_RX.shape[1] - top_k
    last_R1 = np.partition(values_RX, position, axis=1)[:, position : position + 1]
    above_RX = values_RX > last_R1 + _SAME
    # Values that rounding has split are one tie. Taken as they are, which of two equal experts is selected would hang on the
    # processor, and a row could hold more than top_k or fewer.
    tied_RX = np.abs(values_RX - last_R1) <= _SAME
    still_free_R1 = top_k - above_RX.sum(axis=1, keepdims=True)
    return np.asarray(above_RX | (tied_RX & (np.cumsum(tied_RX, axis=1) <= still_free_R1)))
