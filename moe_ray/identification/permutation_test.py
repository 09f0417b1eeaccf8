"""Permutation tests of a batch's risk differences, with the prompt as the unit.

Tokens of one prompt are not independent, so labels are exchanged between prompts (inside pairs where there are pairs),
never between tokens. The difference of pooled rates is linear in the label vector once each expert's counts are centred
at its overall rate, so all relabellings of a batch are one matrix product.

The test is one-sided, as the selection is: large positive differences count. Each difference is divided by its
prompt-clustered standard error under the hypothesis of no difference, computed anew for every relabelling, for two reasons.
Experts that vary a lot from prompt to prompt then don't set the bar for all others, as they would with raw differences.
And unsafe prompts are often longer: dividing by anything that does not follow the relabelling (raw differences' own spread
over relabellings, say) gave false alarms in 17 to 41% of null batches with prompts three to four times longer, this in 3 to
5%. With prompts of equal length it ranks relabellings as the two-sample t statistic does. Equal weight per prompt cannot be
mended this way, as the standard error is then the same for every relabelling: 8 to 14% there.

Values closer than rounding count as equal, which can only make p larger.

Shape suffixes: N examples, X experts of all layers, P relabellings.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from moe_ray.identification.relabellings import Relabellings, canonical_order, group_of_each, relabellings
from moe_ray.identification.risk import Floats

Reals = npt.NDArray[np.floating[Any]]

_EXPERTS_AT_ONCE = 64  # two blocks of 6,435 float32 values for each: 3 MB, which processor caches hold
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

    def __repr__(self) -> str:
        num_unsafe = int(self.is_unsafe_N.sum())
        num_pairs = len(np.unique(self.groups_N[self.groups_N > 0]))
        labels = f"{len(self.is_unsafe_N) - num_unsafe} safe + {num_unsafe} unsafe"
        return f"Samples({labels}, {num_pairs} pairs, {self.values_NX.shape[1]} experts)"

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

    def centred(self) -> Floats:
        """(N, X) values less what each example would have at the expert's overall rate; columns sum to 0."""
        rate_X = self.values_NX.sum(axis=0) / self.sizes_N.sum()
        return np.asarray(self.values_NX - self.sizes_N[:, None] * rate_X)


@dataclass(frozen=True, kw_only=True)
class PermutationTest:
    """One-sided p-values of a batch.

    Attributes:
        p_X: (X,) share of relabellings with a studentised difference as large as the observed one; never 0.
        p_maxt_X: (X,) share of relabellings in which the largest studentised difference of all experts is as large as this
            expert's: the chance of a single false alarm among all experts.
        maxima_P: (relabellings,) that largest value, ascending.
        is_exact: all relabellings were used.
    """

    p_X: Floats
    p_maxt_X: Floats
    maxima_P: Reals
    is_exact: bool

    def __repr__(self) -> str:
        num, how = len(self.maxima_P), "all" if self.is_exact else "drawn"
        return (
            f"PermutationTest({len(self.p_X)} experts, {num} relabellings ({how}), smallest {self.p_maxt_X.min():.3g})"
        )


def permutation_test(samples: Samples, *, limit: int = 20_000, seed: int = 0) -> PermutationTest:
    """Exact where a batch has no more than `limit` relabellings, else from `limit` drawn by `seed`.

    Source: Westfall & Young (1993), single-step maxT; p = (b + 1) / (m + 1) after Phipson & Smyth (2010), where the
    observed labels are the one relabelling in both; studentised after Chung & Romano (2013).
    """
    order, strata = canonical_order(samples.is_unsafe_N, samples.groups_N)
    labels = relabellings(strata, limit, seed)
    factors = _factors(samples, labels, order)
    hits_X, maxima_P, bound_X = _count_hits(factors, labels.is_mirrored)
    maxima_P.sort()
    above_X = labels.num - np.searchsorted(maxima_P, bound_X, side="left")
    return PermutationTest(
        p_X=hits_X / labels.num, p_maxt_X=above_X / labels.num, maxima_P=maxima_P, is_exact=labels.is_exact
    )


@dataclass(frozen=True, kw_only=True)
class _Factors:
    """The statistic of every expert and relabelling is `linear_XN @ linear_NP / sqrt(square_XM @ square_MP)`.

    M is the N examples and one more row for what the two examples of a pair have in common.
    """

    linear_XN: Reals
    linear_NP: Reals
    square_XM: Reals
    square_MP: Reals

    @property
    def tolerance(self) -> float:
        """What rounding can make of equal values: the worst case of a sum of N products."""
        return self._of_rounding(self.linear_NP)

    @property
    def variance_tolerance(self) -> float:
        """The same of a variance that is 0."""
        return self._of_rounding(self.square_MP)

    def _of_rounding(self, factor: Reals) -> float:
        num = len(factor)
        return float(np.finfo(factor.dtype).eps * num**1.5 * factor.max())


def _factors(samples: Samples, labels: Relabellings, order: npt.NDArray[np.int64]) -> _Factors:
    """Differences and their variances as products; sizes are in units of half of all, so that values are near 1.

    Pairs need double precision, since the variance of their differences is a small difference of large numbers.
    """
    groups_N, sizes_N = samples.groups_N[order], samples.sizes_N[order]
    dtype: type[np.floating] = np.float64 if groups_N.any() else np.float32
    centred_XN = _unit_rows(samples.centred().T[:, order], samples)
    # Of a pair, one example is unsafe and the other safe in every relabelling, so that its part of the difference is
    # a / unsafe - b / safe. Its square has a cross term -2ab / (unsafe safe), which is what the two have in common; without
    # it, the error of pairs whose prompts are alike would be far too large, and pairing would find nothing more.
    common_X = np.zeros(len(centred_XN))
    for group in np.unique(groups_N[groups_N > 0]):
        rows = groups_N == group
        common_X += centred_XN[:, rows].sum(axis=1) ** 2 - np.square(centred_XN[:, rows]).sum(axis=1)
    # An expert that does not vary has the value 0 / 0, and a NaN would become the maximum of every relabelling; a variance
    # of 1 makes it 0.
    silent_X1 = ~centred_XN.any(axis=1, keepdims=True)
    unsafe_NP = labels.unsafe_NP.astype(np.float64)
    unsafe_P = 2 * (sizes_N @ unsafe_NP) / sizes_N.sum()
    safe_P = 2 - unsafe_P
    # The error follows the relabelling: where unsafe prompts are longer, a relabelling that calls short ones unsafe has a
    # noisier rate, and a fixed error would call that noise a large difference (see the module's text).
    squares_NP = unsafe_NP / unsafe_P**2 + (1 - unsafe_NP) / safe_P**2
    return _Factors(
        # Centred values sum to 0, so the safe examples' sum is minus the unsafe ones': one factor serves both rates.
        linear_XN=centred_XN.astype(dtype),
        linear_NP=(unsafe_NP * (1 / unsafe_P + 1 / safe_P)).astype(dtype),
        square_XM=np.column_stack([np.square(centred_XN) + silent_X1, -common_X]).astype(dtype),
        square_MP=np.vstack([squares_NP, 1 / (unsafe_P * safe_P)]).astype(dtype),
    )


def _unit_rows(centred_XN: Floats, samples: Samples) -> Floats:
    """Rows of length 1, or of zeros for an expert whose rate is the same in every prompt, up to rounding."""
    squared_X = np.square(centred_XN).sum(axis=1)
    # What centring leaves of an expert with equal rates is rounding. Divided by its own length it would look like a real
    # expert, with differences as large as any, and could set the maximum that all others are compared with.
    varies_X = squared_X > 1e-20 * np.square(samples.values_NX).sum(axis=0)
    length_X = np.sqrt(squared_X, out=np.ones_like(squared_X), where=varies_X)
    return np.asarray(np.where(varies_X[:, None], centred_XN / length_X[:, None], 0.0))


def _count_hits(factors: _Factors, is_mirrored: bool) -> tuple[npt.NDArray[np.int64], Reals, Reals]:
    """Per expert the relabellings as large as observed, per relabelling the largest value, and what counts as that large.

    A relabelling that ties with the observed one may come out a little lower, since its product rounds otherwise. Without a
    tolerance it would not be counted, and p would be too small.

    Memory is two blocks of experts x P. An opposite relabelling has minus the value, so a mirrored set needs half the
    columns: for a positive bound the hits are where the absolute value reaches it.
    """
    num_experts, num_columns = len(factors.linear_XN), factors.linear_NP.shape[1]
    dtype = factors.linear_XN.dtype
    hits_X, bound_X = np.empty(num_experts, np.int64), np.empty(num_experts, dtype)
    highest_P, lowest_P = np.full(num_columns, -np.inf, dtype), np.full(num_columns, np.inf, dtype)
    blocks = np.empty((2, min(_EXPERTS_AT_ONCE, num_experts), num_columns), dtype)
    for start in range(0, num_experts, _EXPERTS_AT_ONCE):
        block = slice(start, min(start + _EXPERTS_AT_ONCE, num_experts))
        values_XP, errors_XP = blocks[:, : block.stop - start]
        product(factors.linear_XN[block], factors.linear_NP, out=values_XP)
        product(factors.square_XM[block], factors.square_MP, out=errors_XP)
        # With pairs the variance is a difference of large numbers: rounding leaves about 0, or less, where every pair trades
        # without effect. Its root would be NaN, or so small that the difference, 0 as well but for rounding, became large.
        if dtype == np.float64:
            is_nothing_XP = errors_XP <= factors.variance_tolerance
            errors_XP[is_nothing_XP], values_XP[is_nothing_XP] = 1.0, 0.0
        np.sqrt(errors_XP, out=errors_XP)
        np.divide(values_XP, errors_XP, out=values_XP)
        # Dividing by a small error makes what rounding left large; without pairs errors are near 1.
        least_X = np.minimum(1.0, errors_XP.min(axis=1)) if dtype == np.float64 else 1.0
        # Over all experts, not only this block's: the largest of the batch is what single-step maxT compares with. The
        # least one, negated, is the largest of the opposite relabelling.
        np.maximum(highest_P, values_XP.max(axis=0), out=highest_P)
        np.minimum(lowest_P, values_XP.min(axis=0), out=lowest_P)
        bound_X[block] = values_XP[:, 0] - dtype.type(factors.tolerance) / least_X
        hits_X[block] = _hits_of_block(values_XP, bound_X[block], is_mirrored)
    return hits_X, np.concatenate([highest_P, -lowest_P]) if is_mirrored else highest_P, bound_X


def _hits_of_block(values_XP: Reals, bound_X: Reals, is_mirrored: bool) -> npt.NDArray[np.int64]:
    """(X,) relabellings, opposites among them, whose value is at least the bound; overwrites `values_XP`."""
    if not is_mirrored:
        return np.array([np.count_nonzero(row) for row in values_XP >= bound_X[:, None]], dtype=np.int64)
    np.abs(values_XP, out=values_XP)
    # At a bound of 0 or below, one of the two opposites is always a hit and both are while |value| <= |bound|.
    edge_X = np.where(bound_X > 0, bound_X, np.nextafter(-bound_X, bound_X.dtype.type(np.inf)))
    reached_X = np.array([np.count_nonzero(row) for row in values_XP >= edge_X[:, None]], dtype=np.int64)
    return np.where(bound_X > 0, reached_X, 2 * values_XP.shape[1] - reached_X)


def product(left: Reals, right: Reals, *, out: Reals | None = None) -> Reals:
    """`left @ right`, in pieces so small that they run in the calling thread."""
    result: Reals = np.empty((left.shape[0], right.shape[1]), dtype=left.dtype) if out is None else out
    width = max(16, _PRODUCT_SIZE // (left.shape[0] * left.shape[1]))
    for start in range(0, right.shape[1], width):
        np.matmul(left, right[:, start : start + width], out=result[:, start : start + width])
    return result
