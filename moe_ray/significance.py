"""How sure a batch's risk differences are: permutation tests and intervals with the prompt as the unit.

Tokens of one prompt are not independent, so labels are exchanged between prompts (inside pairs where there are pairs),
never between tokens. The difference of pooled rates is linear in the label vector once each expert's counts are centred
at its overall rate, so all relabellings of a batch are one matrix product.

The test is one-sided, as the selection is: large positive differences count. For the correction over experts each
difference is divided by a scale that relabelling does not change, the spread of the expert's counts from prompt to
prompt. With equal prompt lengths that ranks experts exactly as the two-sample t statistic does, so that an expert which
varies a lot from prompt to prompt doesn't set the bar for all others as it would with raw differences, and it costs no
second product as a full studentisation would. p of a single expert is the same with or without the scale.

Values closer than float32 rounding count as equal, which can only make p larger.

Shape suffixes: N examples, X experts of all layers, P relabellings, R resamples.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy.special import stdtrit
from scipy.stats import false_discovery_control

from moe_ray.relabelling import Relabellings, canonical_order, group_of_each, relabellings
from moe_ray.risk import Floats

_EXPERTS_AT_ONCE = 32  # with 6,435 relabellings a block of float32 values stays in a core's second-level cache
_PRODUCT_SIZE = 250_000  # multiplications in one call; above, OpenBLAS starts threads, which is slower on shared cores


@dataclass(frozen=True, kw_only=True)
class Samples:
    """What a test compares: per example a numerator for each expert, and a denominator.

    Attributes:
        values_NX: (N, X) routed tokens, routed weight, or a prompt's own rate.
        sizes_N: (N,) tokens, or 1 where every prompt counts alike.
        is_unsafe_N: (N,) bool, both values present.
        groups_N: (N,) stratum of each example, see `group_of_each`.
    """

    values_NX: Floats
    sizes_N: Floats
    is_unsafe_N: npt.NDArray[np.bool_]
    groups_N: npt.NDArray[np.int64]

    @classmethod
    def of(
        cls,
        values_NX: npt.ArrayLike,
        sizes_N: npt.ArrayLike,
        is_unsafe_N: npt.NDArray[np.bool_],
        pairs_N: npt.NDArray[np.object_] | None = None,
    ) -> Samples:
        """Samples of plain arrays; `pairs_N` holds equal text on the examples of a pair."""
        values_NX, sizes_N = np.asarray(values_NX, dtype=np.float64), np.asarray(sizes_N, dtype=np.float64)
        groups_N = group_of_each(is_unsafe_N, pairs_N)
        return cls(values_NX=values_NX, sizes_N=sizes_N, is_unsafe_N=is_unsafe_N, groups_N=groups_N)

    def difference(self) -> Floats:
        """(X,) summed values / summed sizes of the unsafe examples, less that of the safe ones."""
        unsafe = self.is_unsafe_N
        rates = [self.values_NX[rows].sum(axis=0) / self.sizes_N[rows].sum() for rows in (unsafe, ~unsafe)]
        return np.asarray(rates[0] - rates[1])


@dataclass(frozen=True, kw_only=True)
class PermutationTest:
    """One-sided p-values of a batch.

    Attributes:
        p_X: (X,) share of relabellings with a difference as large as the observed one; never 0.
        p_maxt_X: (X,) share of relabellings in which the largest scaled difference of all experts is as large as this
            expert's: the chance of a single false alarm among all experts.
        maxima_P: (relabellings,) that largest value, ascending.
        is_exact: all relabellings were used.
    """

    p_X: Floats
    p_maxt_X: Floats
    maxima_P: npt.NDArray[np.float32]
    is_exact: bool


def permutation_test(samples: Samples, *, limit: int = 20_000, seed: int = 0) -> PermutationTest:
    """Exact where a batch has no more than `limit` relabellings, else from `limit` drawn by `seed`.

    Source: Westfall & Young (1993), single-step maxT; p = (b + 1) / (m + 1) after Phipson & Smyth (2010), where the
    observed labels are the one relabelling in both.
    """
    order, strata = canonical_order(samples.is_unsafe_N, samples.groups_N)
    labels = relabellings(strata, limit, seed)
    scaled_XN = (_centred(samples) / _scale(samples)).T[:, order].astype(np.float32)
    weights_NP = _label_weights(labels, samples.sizes_N[order])
    tolerance = np.float32(np.finfo(np.float32).eps * len(order) ** 1.5 * weights_NP.max())
    hits_X, maxima_P, observed_X = _count_hits(scaled_XN, weights_NP, tolerance, labels.is_mirrored)
    maxima_P.sort()
    above_X = labels.num - np.searchsorted(maxima_P, observed_X - tolerance, side="left")
    return PermutationTest(
        p_X=hits_X / labels.num, p_maxt_X=above_X / labels.num, maxima_P=maxima_P, is_exact=labels.is_exact
    )


def _centred(samples: Samples) -> Floats:
    """(N, X) values less what each example would have at the expert's overall rate; columns sum to 0."""
    rate_X = samples.values_NX.sum(axis=0) / samples.sizes_N.sum()
    return np.asarray(samples.values_NX - samples.sizes_N[:, None] * rate_X)


def _spread(left_NX: Floats, right_NX: Floats, samples: Samples) -> Floats:
    """(X,) covariance, over relabellings, of the two sums over unsafe examples."""
    total = np.zeros(np.broadcast_shapes(left_NX.shape, right_NX.shape)[1])
    for group in np.unique(samples.groups_N):
        rows = samples.groups_N == group
        size, unsafe = int(rows.sum()), int((rows & samples.is_unsafe_N).sum())
        left, right = left_NX[rows], right_NX[rows]
        factor = unsafe * (size - unsafe) / (size * max(size - 1, 1))
        total += factor * ((left - left.mean(axis=0)) * (right - right.mean(axis=0))).sum(axis=0)
    return total


def _scale(samples: Samples) -> Floats:
    """(X,) what differences are divided by; infinite for an expert that never varies, which then has value 0."""
    centred_NX = _centred(samples)
    variance_X = _spread(centred_NX, centred_NX, samples)
    rounding_X = 1e-20 * np.square(samples.values_NX).sum(axis=0)
    return np.sqrt(variance_X, out=np.full_like(variance_X, np.inf), where=variance_X > rounding_X)


def _label_weights(labels: Relabellings, sizes_N: Floats) -> npt.NDArray[np.float32]:
    """(N, P): labels times 1/unsafe size + 1/safe size, near 1 where a relabelling has equal sizes on both sides."""
    unsafe_P = sizes_N @ labels.unsafe_NP
    total = sizes_N.sum()
    factor_P = np.divide(total**2 / 4, unsafe_P * (total - unsafe_P))
    return np.asarray(labels.unsafe_NP * factor_P, dtype=np.float32)


def _count_hits(
    scaled_XN: npt.NDArray[np.float32],
    weights_NP: npt.NDArray[np.float32],
    tolerance: np.float32,
    is_mirrored: bool,
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float32], npt.NDArray[np.float32]]:
    """Per expert the relabellings as large as observed, per relabelling the largest value, and the observed values.

    Memory is a block of experts x P. An opposite relabelling has minus the value, so a mirrored set needs half the
    columns: for a positive bound the hits are where the absolute value reaches it.
    """
    num_experts, num_columns = len(scaled_XN), weights_NP.shape[1]
    hits_X, observed_X = np.empty(num_experts, np.int64), np.empty(num_experts, np.float32)
    highest_P, lowest_P = np.full(num_columns, -np.inf, np.float32), np.full(num_columns, np.inf, np.float32)
    for start in range(0, num_experts, _EXPERTS_AT_ONCE):
        block = slice(start, start + _EXPERTS_AT_ONCE)
        values_XP = product(scaled_XN[block], weights_NP)
        np.maximum(highest_P, values_XP.max(axis=0), out=highest_P)
        np.minimum(lowest_P, values_XP.min(axis=0), out=lowest_P)
        observed_X[block] = values_XP[:, 0]
        hits_X[block] = _hits_of_block(values_XP, observed_X[block] - tolerance, is_mirrored)
    return hits_X, np.concatenate([highest_P, -lowest_P]) if is_mirrored else highest_P, observed_X


def _hits_of_block(
    values_XP: npt.NDArray[np.float32], bound_X: npt.NDArray[np.float32], is_mirrored: bool
) -> npt.NDArray[np.int64]:
    """(X,) relabellings whose value is at least the bound; overwrites `values_XP`."""
    if not is_mirrored:
        return np.array([np.count_nonzero(row) for row in values_XP >= bound_X[:, None]], dtype=np.int64)
    np.abs(values_XP, out=values_XP)
    # At a bound of 0 or below, one of the two opposites is always a hit and both are while |value| <= |bound|.
    edge_X = np.where(bound_X > 0, bound_X, np.nextafter(-bound_X, np.float32(np.inf)))
    reached_X = np.array([np.count_nonzero(row) for row in values_XP >= edge_X[:, None]], dtype=np.int64)
    return np.where(bound_X > 0, reached_X, 2 * values_XP.shape[1] - reached_X)


def product(left: npt.NDArray[np.float32], right: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    """`left @ right`, in pieces so small that they run in the calling thread."""
    out = np.empty((left.shape[0], right.shape[1]), dtype=np.float32)
    width = max(16, _PRODUCT_SIZE // (left.shape[0] * left.shape[1]))
    for start in range(0, right.shape[1], width):
        np.matmul(left, right[:, start : start + width], out=out[:, start : start + width])
    return out


def q_values(p_X: Floats) -> Floats:
    """Smallest false discovery rate at which each expert would be called.

    Source: Benjamini & Hochberg (1995).
    """
    return np.asarray(false_discovery_control(p_X, method="bh"))


def smallest_effect(samples: Samples, test: PermutationTest, *, alpha: float = 0.05) -> Floats:
    """(X,) the smallest risk difference that the batch could have certified, corrected for all experts.

    The prompts' own variation is kept, the observed difference is replaced by another, and the value that the largest of
    all experts stays below in all but a share `alpha` of the relabellings is taken as it is. Infinite where no
    difference of at most 1 is enough; NaN for an expert that no token was routed to.
    """
    allowed = int(alpha * len(test.maxima_P))
    bar = float(test.maxima_P[-allowed]) if allowed else np.inf
    share = samples.sizes_N[samples.is_unsafe_N].sum() / samples.sizes_N.sum()
    shift_N1 = (samples.sizes_N * (samples.is_unsafe_N - share))[:, None]
    rest_NX = _centred(samples) - samples.difference() * shift_N1
    within_X = _spread(rest_NX, rest_NX, samples)
    crossed_X = _spread(rest_NX, shift_N1, samples)
    own = float(_spread(shift_N1, shift_N1, samples)[0])
    # Solves gain * effect = bar * sqrt(within + 2 crossed effect + own effect^2), gain = value of a unit difference.
    lead = (samples.sizes_N.sum() / 4) ** 2 - bar**2 * own
    if not np.isfinite(lead) or lead <= 0:
        effect_X = np.full(len(within_X), np.inf)
    else:
        half_X = bar**2 * crossed_X
        effect_X = (half_X + np.sqrt(half_X**2 + lead * bar**2 * within_X)) / lead
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
    singles_N = samples.groups_N == 0
    names_N = np.where(singles_N, -1 - np.arange(len(singles_N)), samples.groups_N)
    names_C, firsts_C, cluster_N = np.unique(names_N, return_index=True, return_inverse=True)
    return _Clusters(cluster_N, np.where(names_C > 0, 0, 1 + samples.is_unsafe_N[firsts_C]))


def cluster_interval(samples: Samples, *, level: float = 0.95) -> tuple[Floats, Floats]:
    """(X,) lower and upper end of the difference's interval, with prompts (or pairs) as clusters, within -1 to 1.

    Linearised variance of the two ratios and Student's t with Satterthwaite's degrees of freedom. With one cluster of a
    kind nothing is known and the interval is -1 to 1. An expert that does not vary has an interval of width 0.

    Source: Cochran (1977), Sampling Techniques, 6.3; Satterthwaite (1946).
    """
    clusters = _clusters(samples)
    residuals_NX = np.empty_like(samples.values_NX)
    for rows, sign in ((samples.is_unsafe_N, 1), (~samples.is_unsafe_N, -1)):
        total = samples.sizes_N[rows].sum()
        rate_X = samples.values_NX[rows].sum(axis=0) / total
        residuals_NX[rows] = sign * (samples.values_NX[rows] - samples.sizes_N[rows, None] * rate_X) / total
    sums_CX = clusters.add_up(residuals_NX)
    variance_X, weighted_X = np.zeros(sums_CX.shape[1]), np.zeros(sums_CX.shape[1])
    for kind in np.unique(clusters.kinds_C):
        own_CX = sums_CX[clusters.kinds_C == kind]
        if len(own_CX) == 1:
            return np.full(len(variance_X), -1.0), np.full(len(variance_X), 1.0)
        part_X = len(own_CX) * own_CX.var(axis=0, ddof=1)
        variance_X += part_X
        weighted_X += part_X**2 / (len(own_CX) - 1)
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
        own = clusters.kinds_C == kind
        draws_RC[:, own] = rng.multinomial(own.sum(), np.full(own.sum(), 1 / own.sum()), size=resamples)
    times_RN = draws_RC[:, clusters.cluster_N]
    weights_RN = np.zeros_like(times_RN)
    for rows, sign in ((samples.is_unsafe_N, 1), (~samples.is_unsafe_N, -1)):
        weights_RN[:, rows] = sign * times_RN[:, rows] / (times_RN[:, rows] @ samples.sizes_N[rows])[:, None]
    difference_RX = product(weights_RN.astype(np.float32), samples.values_NX.astype(np.float32))
    selected_RX = difference_RX > threshold
    if top_k < difference_RX.shape[1]:
        selected_RX &= difference_RX >= -np.partition(-difference_RX, top_k - 1, axis=1)[:, top_k - 1 : top_k]
    return np.asarray(selected_RX.mean(axis=0))
