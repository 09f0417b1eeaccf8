"""In how many relabellings each expert's value is as large as observed, and how large the largest of all experts is.

Tens of millions of values a batch are looked at in single precision, which tells nearly all of them apart from what they are
compared with. The few that are nearer to it than rounding reaches are computed again in double precision. So the counts are
those of double precision, and the same whether the first look is numpy's or the compiled kernel's.

Values closer than rounding in double precision count as equal, which can only make p larger: a relabelling that ties with
the observed one may come out a little lower, since its sums round otherwise.

Shape suffixes: X experts of all layers, P relabellings, M single values.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from threadpoolctl import ThreadpoolController

from moe_ray.identification.relabelling_kernel import MOST_NEAR, KernelOfBatch, block_size, kernel_of
from moe_ray.identification.relabellings import Relabellings
from moe_ray.identification.risk import Floats
from moe_ray.identification.studentised import Reals, Studentised

_SAME = 1e-9
"""Values closer than this are equal: rounding makes less of it, and values that differ lie further apart."""

_WIDEST_BOUND = 0.02
"""Where single precision may be off by more, everything is computed in double."""

Places = tuple[npt.NDArray[np.int32], npt.NDArray[np.int32]]
"""(M,) experts and (M,) relabellings of single values."""


@dataclass(frozen=True)
class RelabellingCounts:
    """What the p-values of a batch are made of.

    Attributes:
        hits_X: (X,) relabellings, opposites among them, whose value is at least the observed one.
        maxima_P: (P,) the largest value of all experts; of a mirrored set opposites come after, so (2P,).
        bound_X: (X,) the observed value, less what rounding can make of equal values.
    """

    hits_X: npt.NDArray[np.int64]
    maxima_P: Floats
    bound_X: Floats


class Swept(NamedTuple):
    """What single precision tells.

    Attributes:
        sure_X: values that surely reach the expert's pivot.
        near_X: values too near to tell.
        near: those of them that were noted, all of an expert with at most `MOST_NEAR`.
        largest: every value that may be the largest of its relabelling, and perhaps others.
        least: the same of the least.
    """

    sure_X: npt.NDArray[np.int64]
    near_X: npt.NDArray[np.int64]
    near: Places
    largest: Places
    least: Places


def count_relabellings(statistic: Studentised, labels: Relabellings, *, compiled: bool = True) -> RelabellingCounts:
    """Counts of a batch.

    An opposite relabelling has minus the value, so a mirrored set needs half the columns: for a positive bound the hits are
    where the absolute value reaches it.

    Args:
        statistic: of the batch.
        labels: that it was made with.
        compiled: use the compiled kernel where it serves these relabellings; the counts are the same.
    """
    with one_blas_thread():
        return _count(statistic, labels, compiled)


def _count(statistic: Studentised, labels: Relabellings, compiled: bool) -> RelabellingCounts:
    bound_X = statistic.values(columns=slice(0, 1))[:, 0] - _SAME
    kernel = kernel_of(labels) if compiled and not statistic.has_pairs else None
    batch = None if kernel is None else kernel.of(statistic)
    # At a bound of 0 or below, one of two opposites is always a hit, and both are while |value| <= |bound|.
    is_above_X = (bound_X > 0) | (not labels.is_mirrored)
    pivot_X = np.where(is_above_X, bound_X, np.nextafter(-bound_X, np.inf))
    swept = _swept(statistic, batch, pivot_X, labels.is_mirrored)
    if swept is None:
        reached_X, highest_P, lowest_P = _in_double(statistic, np.arange(statistic.num_experts), pivot_X, labels)
    else:
        reached_X = _resolved(statistic, batch, swept, pivot_X, labels)
        evaluate = statistic.elements if batch is None else batch.elements
        highest_P, lowest_P = np.full((2, statistic.num_columns), -np.inf)
        np.maximum.at(highest_P, swept.largest[1], evaluate(*swept.largest))
        np.maximum.at(lowest_P, swept.least[1], -evaluate(*swept.least))
        lowest_P = -lowest_P
    hits_X = np.where(is_above_X, reached_X, 2 * statistic.num_columns - reached_X)
    maxima_P = np.concatenate([highest_P, -lowest_P]) if labels.is_mirrored else highest_P
    return RelabellingCounts(hits_X, maxima_P, bound_X)


def _swept(statistic: Studentised, batch: KernelOfBatch | None, pivot_X: Floats, is_mirrored: bool) -> Swept | None:
    """None where only double precision tells: with pairs, extreme lengths, or more ties than are worth noting."""
    margin = statistic.bound_of_rounding
    if statistic.has_pairs or not margin < _WIDEST_BOUND:
        return None
    low_X, high_X = (_signed_square(pivot_X + way * margin).astype(np.float32) for way in (-1, 1))
    if batch is None:
        return _sweep(statistic, low_X, high_X, 2 * margin, is_mirrored)
    found = batch.sweep(low_X, high_X, margin=2 * margin, is_mirrored=is_mirrored)
    return None if found is None else Swept(*found)


def _resolved(
    statistic: Studentised, batch: KernelOfBatch | None, swept: Swept, pivot_X: Floats, labels: Relabellings
) -> npt.NDArray[np.int64]:
    """(X,) values that reach the pivot, all told."""
    reached_X = swept.sure_X.copy()
    crowded = np.flatnonzero(swept.near_X > MOST_NEAR)
    if len(crowded):
        if batch is None or not batch.counts_exactly:
            reached_X[crowded] = _in_double(statistic, crowded, pivot_X, labels)[0]
        else:
            reached_X[crowded] = batch.count_exactly(crowded, pivot_X[crowded], is_mirrored=labels.is_mirrored)
    expert_M, column_M = swept.near
    few_M = swept.near_X[expert_M] <= MOST_NEAR
    expert_M, column_M = expert_M[few_M], column_M[few_M]
    values_M = (statistic if batch is None else batch).elements(expert_M, column_M)
    values_M = np.abs(values_M) if labels.is_mirrored else values_M
    reached_X += np.bincount(expert_M[values_M >= pivot_X[expert_M]], minlength=len(reached_X))
    return reached_X


def _in_double(
    statistic: Studentised, experts: npt.NDArray[np.int64], pivot_X: Floats, labels: Relabellings
) -> tuple[npt.NDArray[np.int64], Floats, Floats]:
    """Of some experts the values that reach their pivot, and per relabelling their largest and their least value."""
    reached = np.empty(len(experts), np.int64)
    highest_P, lowest_P = np.full(statistic.num_columns, -np.inf), np.full(statistic.num_columns, np.inf)
    size = block_size(statistic.num_columns, 8)
    for start in range(0, len(experts), size):
        block = experts[start : start + size]
        values_XP = statistic.values(block)
        np.maximum(highest_P, values_XP.max(axis=0), out=highest_P)
        np.minimum(lowest_P, values_XP.min(axis=0), out=lowest_P)
        compared_XP = np.abs(values_XP, out=values_XP) if labels.is_mirrored else values_XP
        reached[start : start + len(block)] = np.count_nonzero(compared_XP >= pivot_X[block, None], axis=1)
    return reached, highest_P, lowest_P


def _sweep(statistic: Studentised, low_X: Reals, high_X: Reals, margin: float, is_mirrored: bool) -> Swept:
    """The first look by numpy; what the compiled kernel does, and it notes the same."""
    sources, factors = statistic.in_single_precision(statistic.num_columns)
    curve_P = statistic.curve_P.astype(np.float32)
    num_experts, num_columns = statistic.num_experts, statistic.num_columns
    size = min(block_size(num_columns, 4), num_experts)
    blocks = np.empty((3, size, num_columns), np.float32)
    top_P, bottom_P = np.full(num_columns, -np.inf, np.float32), np.full(num_columns, np.inf, np.float32)
    sure_X, near_X = np.zeros(num_experts, np.int64), np.zeros(num_experts, np.int64)
    near, largest, least = list[Any](), list[Any](), list[Any]()
    for start in range(0, num_experts, size):
        block = slice(start, min(start + size, num_experts))
        differences_XP, within_XP, values_XP = blocks[:, : block.stop - start]
        for rows, factor, out in zip(sources, factors, (differences_XP, within_XP, values_XP), strict=True):
            np.matmul(rows[block], factor, out=out)
        _signed_squares_of_r(differences_XP, within_XP, values_XP, curve_P)
        raised_P, sunk_P = values_XP.max(axis=0), values_XP.min(axis=0)
        largest.append(_extreme(values_XP, raised_P, top_P, start, margin))
        least.append(_extreme(-values_XP, -sunk_P, -bottom_P, start, margin))
        np.maximum(top_P, raised_P, out=top_P)
        np.minimum(bottom_P, sunk_P, out=bottom_P)
        compared_XP = np.abs(values_XP, out=values_XP) if is_mirrored else values_XP
        sure_X[block] = np.count_nonzero(compared_XP >= high_X[block, None], axis=1)
        near_X[block] = np.count_nonzero(compared_XP >= low_X[block, None], axis=1) - sure_X[block]
        few = np.flatnonzero((near_X[block] > 0) & (near_X[block] <= MOST_NEAR))
        chosen_XP = compared_XP[few]
        low, high = low_X[block][few, None], high_X[block][few, None]
        row_M, column_M = np.nonzero((chosen_XP >= low) & ~(chosen_XP >= high))
        near.append((start + few[row_M], column_M))
    return Swept(sure_X, near_X, *map(_joined, (near, largest, least)))


def _signed_squares_of_r(differences_XP: Reals, within_XP: Reals, values_XP: Reals, curve_P: Reals) -> None:
    """Overwrites the values, which come as `mixed`, with `r |r|`; the others are overwritten too."""
    errors_XP = differences_XP * curve_P
    errors_XP += values_XP
    errors_XP *= differences_XP
    errors_XP += within_XP
    np.abs(differences_XP, out=within_XP)
    np.multiply(differences_XP, within_XP, out=values_XP)
    values_XP /= errors_XP


def _extreme(values_XP: Reals, raised_P: Reals, top_P: Reals, start: int, margin: float) -> Any:
    """Places of a block's values that may be the largest of their relabelling, given the largest before."""
    edge_P = _signed_square(_root(np.maximum(raised_P, top_P)) - np.float32(margin))
    columns = np.flatnonzero(raised_P >= edge_P)
    row_M, position_M = np.nonzero(values_XP[:, columns] >= edge_P[columns])
    return start + row_M, columns[position_M]


def _joined(places: list[Any]) -> Places:
    expert_M, column_M = (np.concatenate([part[i] for part in places]).astype(np.int32) for i in (0, 1))
    return expert_M, column_M


def _signed_square(values: Any) -> Any:
    return values * np.abs(values)


def _root(values: Any) -> Any:
    return np.sign(values) * np.sqrt(np.abs(values))


@lru_cache(maxsize=1)
def _threadpools() -> ThreadpoolController:
    return ThreadpoolController()


def one_blas_thread() -> Any:
    """A context in which products run in the calling thread: they are so small that threads get in each other's way."""
    return _threadpools().limit(limits=1, user_api="blas")
