"""The studentised difference of every expert under every relabelling, as three matrix products.

The standard error is that of the labels' *own* rates: each prompt's residual is taken about the rate of the label that a
relabelling gives it, and both rates are computed anew for every relabelling. With residuals `c` about the expert's
overall rate, a label's sum of squares about its own rate is `sum c^2 - 2 d sum c T + d^2 sum T^2`, where `d` is how far its
rate lies from the overall one and `T` are its tokens; `d` is a known multiple of the difference. So with

    difference = linear @ L,   within = square @ S,   mixed = cross @ C,   curve known per relabelling

the variance is `within + difference * (mixed + difference * curve)`.

Values are handed out as `r = difference / sqrt(variance + floor * difference^2)`. With one `floor` for the whole batch r
grows with t = difference / sqrt(variance) and with nothing else, so it ranks as t does; and it stays finite where prompts
of a label do not differ at all, which t does not.

Shape suffixes: N examples, X experts of all layers, P relabellings, M what a product runs over.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt

from moe_ray.identification.relabellings import Relabellings
from moe_ray.identification.risk import Floats
from moe_ray.identification.samples import Samples

Reals = npt.NDArray[np.floating[Any]]

_NOTHING = 1e-12
"""A variance of less than this part of what went into it is a sum of rounding."""


@dataclass(frozen=True, kw_only=True)
class Studentised:
    """The factors of a batch's studentised differences; rows of `linear_XN` have length 1, or are 0 for a silent expert.

    Attributes:
        linear_XN: (X, N) values about the expert's overall rate.
        square_XM: (X, N), with pairs (X, N + 1).
        cross_XM: (X, N), with pairs (X, 3N).
        unsafe_NP: (N, P) 1 = called unsafe.
        linear_P: (P,) what the unsafe examples' sum is multiplied by to be the difference.
        square_MP: of `within`.
        cross_MP: of `mixed`.
        curve_P: (P,) with the floor.
        floor: see the module.
        has_pairs: a variance of 0 is possible, where every pair trades without effect.
        bound_of_rounding: how far a value of r in single precision is from r at most.
    """

    linear_XN: Floats
    square_XM: Floats
    cross_XM: Floats
    unsafe_NP: Reals
    linear_P: Floats
    square_MP: Floats
    cross_MP: Floats
    curve_P: Floats
    floor: float
    has_pairs: bool
    bound_of_rounding: float

    @property
    def num_experts(self) -> int:
        """Of all layers."""
        return len(self.linear_XN)

    @property
    def num_columns(self) -> int:
        """Relabellings, opposites not counted."""
        return len(self.linear_P)

    def in_single_precision(self, columns: int) -> tuple[list[Reals], list[Reals]]:
        """The left and right factors of difference, `within` and `mixed`, with so many columns, the last of them zeros."""
        rest = ((0, 0), (0, columns - self.num_columns))
        rows = [rows.astype(np.float32) for rows in (self.linear_XN, self.square_XM, self.cross_XM)]
        factors = (self.unsafe_NP * self.linear_P, self.square_MP, self.cross_MP)
        return rows, [np.pad(factor.astype(np.float32), rest) for factor in factors]

    def values(self, experts: Any = slice(None), columns: Any = slice(None)) -> Floats:
        """(experts, columns) r in double precision."""
        difference = self.linear_XN[experts] @ (self.unsafe_NP[:, columns] * self.linear_P[columns])
        within = self.square_XM[experts] @ self.square_MP[:, columns]
        error = self.cross_XM[experts] @ self.cross_MP[:, columns]
        error += difference * self.curve_P[columns]
        error *= difference
        error += within
        return self._divided(difference, error, within)

    def elements(self, expert_M: npt.NDArray[np.int32], column_M: npt.NDArray[np.int32]) -> Floats:
        """(M,) r in double precision of single experts and relabellings."""
        linear_NP = self.unsafe_NP[:, column_M].T * self.linear_P[column_M, None]
        difference = np.einsum("ij,ij->i", self.linear_XN[expert_M], linear_NP)
        within = np.einsum("ij,ij->i", self.square_XM[expert_M], self.square_MP[:, column_M].T)
        mixed = np.einsum("ij,ij->i", self.cross_XM[expert_M], self.cross_MP[:, column_M].T)
        error = within + difference * (mixed + difference * self.curve_P[column_M])
        return self._divided(difference, error, within)

    def _divided(self, difference: Floats, error: Floats, within: Floats) -> Floats:
        # Without pairs the error is at least half of `within`, which no expert has as 0. With pairs it is a difference of
        # large numbers: rounding leaves about 0, or less, where every pair trades without effect. Its root would be NaN, or
        # so small that the difference, 0 as well but for rounding, became large.
        if self.has_pairs:
            nothing = error <= _NOTHING * (self._largest_square + np.abs(within))
            error, difference = np.where(nothing, 1.0, error), np.where(nothing, 0.0, difference)
        return np.asarray(difference / np.sqrt(error))

    @cached_property
    def _largest_square(self) -> float:
        return float(np.abs(self.square_MP).max())

    def as_t(self, values: Floats) -> Floats:
        """The studentised differences that values of r stand for; infinite where the standard error is 0."""
        left = 1 - self.floor * np.square(values)
        # What rounding leaves of 0.
        t = values / np.sqrt(np.maximum(left, _NOTHING))
        return np.asarray(np.where((left > _NOTHING) | (values == 0), t, np.copysign(np.inf, values)))


def studentised(samples: Samples, labels: Relabellings, order: npt.NDArray[np.int64]) -> Studentised:
    """The factors of a batch, its examples in the order of the relabellings.

    Sizes are taken in units of half of all, so that values are near 1.

    Source: residuals about own rates and their effect on a test that permutes labels, Janssen (1997), Chung & Romano (2013);
    the variance of a ratio, Cochran (1977), Sampling Techniques, 6.3.
    """
    groups_N, is_unsafe_N = samples.groups_N[order], samples.is_unsafe_N[order]
    sizes_N = samples.sizes_N[order] * (2 / samples.sizes_N.sum())
    centred_XN = _unit_rows(samples.centred().T[:, order], samples)
    silent_X1 = ~centred_XN.any(axis=1, keepdims=True)
    unsafe_NP = labels.unsafe_NP.astype(np.float64)
    safe_NP = 1 - unsafe_NP
    unsafe_P = sizes_N @ unsafe_NP
    safe_P = 2 - unsafe_P
    when_unsafe_N, when_safe_N = _corrections(groups_N, is_unsafe_N)
    unsafe_weight_NP, safe_weight_NP = when_unsafe_N[:, None] * unsafe_NP, when_safe_N[:, None] * safe_NP
    # The rates of unsafe and safe lie `safe_P / 2` and `-unsafe_P / 2` differences from the overall one.
    square_MP = unsafe_weight_NP / unsafe_P**2 + safe_weight_NP / safe_P**2
    cross_MP = safe_weight_NP * (unsafe_P / safe_P**2) - unsafe_weight_NP * (safe_P / unsafe_P**2)
    curve_P = (np.square(sizes_N) @ unsafe_weight_NP) * (safe_P / (2 * unsafe_P)) ** 2
    curve_P += (np.square(sizes_N) @ safe_weight_NP) * (unsafe_P / (2 * safe_P)) ** 2
    # An expert that does not vary has the value 0 / 0, and a NaN would become the maximum of every relabelling; a variance
    # above 0 makes it 0.
    square_XM, cross_XM = np.square(centred_XN) + silent_X1 / len(sizes_N), centred_XN * sizes_N
    has_pairs = bool(groups_N.any())
    if has_pairs:
        common_X1, swapped_XN, partner_N = _of_pairs(centred_XN, groups_N)
        square_XM = np.hstack([square_XM, -common_X1])
        square_MP = np.vstack([square_MP, when_unsafe_N.max(where=groups_N > 0, initial=0) / (unsafe_P * safe_P)])
        cross_XM = np.hstack([cross_XM, swapped_XN * sizes_N, centred_XN * sizes_N[partner_N]])
        paired_NP = np.where(groups_N > 0, when_unsafe_N, 0.0)[:, None] * unsafe_NP
        cross_MP = np.vstack([cross_MP, paired_NP / unsafe_P, -paired_NP / safe_P])
        products_N = np.where(groups_N > 0, when_unsafe_N * sizes_N * sizes_N[partner_N], 0.0)
        curve_P += products_N.sum() / 4  # each pair is there twice
    # One constant for the batch, or r would not rank as t; as large as the curve, so that a value never is a small
    # difference of large ones.
    floor = float(curve_P.max())
    return Studentised(
        linear_XN=centred_XN,
        square_XM=square_XM,
        cross_XM=cross_XM,
        unsafe_NP=unsafe_NP,
        linear_P=2 / (unsafe_P * safe_P),
        square_MP=square_MP,
        cross_MP=cross_MP,
        curve_P=curve_P + floor,
        floor=floor,
        has_pairs=has_pairs,
        bound_of_rounding=_bound_of_rounding(sizes_N, unsafe_P, cross_MP, floor, when_unsafe_N, when_safe_N),
    )


def about_one_rate(samples: Samples, labels: Relabellings, order: npt.NDArray[np.int64]) -> Studentised:
    """The same with residuals about one rate of all prompts, the standard error under the hypothesis of no difference.

    Without pairs.
    """
    own = studentised(samples, labels, order)
    sizes_N = samples.sizes_N[order] * (2 / samples.sizes_N.sum())
    unsafe_P = sizes_N @ own.unsafe_NP
    square_MP = own.unsafe_NP / unsafe_P**2 + (1 - own.unsafe_NP) / (2 - unsafe_P) ** 2
    ones_N = np.ones(len(sizes_N))
    return replace(
        own,
        square_MP=square_MP,
        cross_XM=np.zeros_like(own.cross_XM),
        cross_MP=np.zeros_like(own.cross_MP),
        curve_P=np.full_like(own.curve_P, own.floor),
        bound_of_rounding=_bound_of_rounding(sizes_N, unsafe_P, own.cross_MP, own.floor, ones_N, ones_N),
    )


def _corrections(groups_N: npt.NDArray[np.int64], is_unsafe_N: npt.NDArray[np.bool_]) -> tuple[Floats, Floats]:
    """(N,) and (N,): n / (n - 1) of the prompts that vary with an example where it is unsafe, and where it is safe.

    A label with a single prompt shows no variation, and has a factor of 1: the error is then that of the other label.
    """
    is_single_N = groups_N == 0
    num_pairs = int((~is_single_N).sum()) // 2
    of_pairs, of_unsafe, of_safe = (
        num / (num - 1) if num > 1 else 1.0
        for num in (num_pairs, int((is_single_N & is_unsafe_N).sum()), int((is_single_N & ~is_unsafe_N).sum()))
    )
    return np.where(is_single_N, of_unsafe, of_pairs), np.where(is_single_N, of_safe, of_pairs)


def _of_pairs(centred_XN: Floats, groups_N: npt.NDArray[np.int64]) -> tuple[Floats, Floats, npt.NDArray[np.int64]]:
    """What the two examples of each pair have in common.

    Of a pair, one example is unsafe and the other safe in every relabelling, so that its part of the difference is
    `a / unsafe - b / safe`. Its square has a cross term -2ab / (unsafe safe); without it, the error of pairs whose prompts
    are alike would be far too large, and pairing would find nothing more.

    Returns:
        (X, 1) twice the sum of the pairs' products; (X, N) the partner's values, 0 without one; (N,) the partner's
        position, its own without one.
    """
    partner_N = np.arange(len(groups_N))
    for group in np.unique(groups_N[groups_N > 0]):
        rows = np.flatnonzero(groups_N == group)
        partner_N[rows] = rows[::-1]
    swapped_XN = np.where(groups_N > 0, centred_XN[:, partner_N], 0.0)
    return (centred_XN * swapped_XN).sum(axis=1, keepdims=True), swapped_XN, partner_N


def _unit_rows(centred_XN: Floats, samples: Samples) -> Floats:
    """Rows of length 1, or of zeros for an expert whose rate is the same in every prompt, up to rounding."""
    squared_X = np.square(centred_XN).sum(axis=1)
    # What centring leaves of an expert with equal rates is rounding. Divided by its own length it would look like a real
    # expert, with differences as large as any, and could set the maximum that all others are compared with.
    varies_X = squared_X > 1e-20 * np.square(samples.values_NX).sum(axis=0)
    length_X = np.sqrt(squared_X, out=np.ones_like(squared_X), where=varies_X)
    return np.asarray(np.where(varies_X[:, None], centred_XN / length_X[:, None], 0.0))


def _bound_of_rounding(
    sizes_N: Floats, unsafe_P: Floats, cross_MP: Floats, floor: float, when_unsafe_N: Floats, when_safe_N: Floats
) -> float:
    """How far single precision can be off, from the worst case of sums of N products; without pairs.

    With `g` the larger label's size, `within` is at least `least = min correction / g^2`, and the error at least half of it.
    """
    num = len(sizes_N)
    unit = (num + 4) * float(np.finfo(np.float32).eps) / 2
    larger, smaller = max(unsafe_P.max(), 2 - unsafe_P.min()), min(unsafe_P.min(), 2 - unsafe_P.max())
    corrections = np.concatenate([when_unsafe_N, when_safe_N])
    error = np.sqrt(corrections.min() / 2) / larger
    of_difference = unit * np.sqrt(num) * 2 / (larger * smaller) / error
    of_within = 3 * unit * corrections.max() / smaller**2 / error**2
    of_mixed = 3 * unit * float(np.sqrt(np.square(sizes_N).sum()) * np.abs(cross_MP).max()) / (np.sqrt(floor) * error)
    return float(5 * of_difference + (of_within + of_mixed) / (2 * np.sqrt(floor)))
