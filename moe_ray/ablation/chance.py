"""What chance alone would give: labels exchanged among a batch's prompts, and the selection among a batch's sets.

Shape suffixes: N prompts, B batches, D sets of a batch, P relabellings.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from moe_ray.identification.relabellings import canonical_order, group_of_each, relabellings

Floats = npt.NDArray[np.float64]

_ROUNDING = 1e-9
"""Differences below this are rounding."""


class Labelled(NamedTuple):
    """The effects of one set on the prompts of one batch.

    Attributes:
        effects_N: nats per token.
        is_unsafe_N: labels.
        pairs_N: what the forms of a request share, or None.
    """

    effects_N: Floats
    is_unsafe_N: npt.NDArray[np.bool_]
    pairs_N: npt.NDArray[np.object_]


def label_p(batches: Sequence[Labelled], *, limit: int, seed: int) -> float:
    """The share of relabellings of prompts, within batches and pairs, that give as large a difference; one-sided.

    The difference of the labels' means, summed over batches, is divided by its standard error about each label's own mean,
    since unsafe effects vary more than safe ones where there is an effect, and labels may have unlike numbers (Janssen 1997;
    Chung & Romano 2013). One batch with no more relabellings than `limit` has all of them; else `limit` are drawn, the
    observed labels among them.

    Args:
        batches: each with two prompts of each label or more.
        limit: most relabellings.
        seed: of drawn ones.
    """
    if not batches:
        return math.nan
    rng = np.random.default_rng(seed)
    difference_P, variance_P = np.zeros(1), np.zeros(1)
    for place, batch in enumerate(batches):
        differences, variances, is_exact = _relabelled(batch, limit, seed + place)
        if len(batches) > 1 or not is_exact:
            # Every batch's own observed labels come first, so the first sum is what was observed.
            drawn = np.concatenate([[0], rng.integers(len(differences), size=limit - 1)])
            differences, variances = differences[drawn], variances[drawn]
        difference_P, variance_P = difference_P + differences, variance_P + variances
    return _share_as_large(_over(difference_P, variance_P))


def _relabelled(batch: Labelled, limit: int, seed: int) -> tuple[Floats, Floats, bool]:
    """Per relabelling of one batch, observed first: difference of means, its variance; and whether these are all."""
    order, strata = canonical_order(batch.is_unsafe_N, group_of_each(batch.is_unsafe_N, batch.pairs_N))
    found = relabellings(strata, limit, seed)
    values_N = batch.effects_N[order]
    unsafe_PN = found.unsafe_NP.T.astype(np.float64)
    unsafe_mean, unsafe_variance = _mean_and_variance(unsafe_PN, values_N)
    safe_mean, safe_variance = _mean_and_variance(1 - unsafe_PN, values_N)
    difference, variance = unsafe_mean - safe_mean, unsafe_variance + safe_variance
    if found.is_mirrored:
        difference, variance = np.concatenate([difference, -difference]), np.concatenate([variance, variance])
    return difference, variance, found.is_exact


def _mean_and_variance(chosen_PN: Floats, values_N: Floats) -> tuple[Floats, Floats]:
    """(P,) mean of the chosen values, and the variance of that mean."""
    size = chosen_PN[0].sum()
    means_P = chosen_PN @ values_N / size
    squares_P = (chosen_PN * np.square(values_N[None] - means_P[:, None])).sum(axis=1)
    return means_P, squares_P / max(1.0, size - 1) / size


def _over(difference_P: Floats, variance_P: Floats) -> Floats:
    """Differences over their standard errors; without any error a difference is infinitely many of them."""
    spread = variance_P > _ROUNDING**2
    with np.errstate(divide="ignore", invalid="ignore"):
        t_P = difference_P / np.sqrt(variance_P)
    certain_P = np.where(np.abs(difference_P) > _ROUNDING, np.copysign(np.inf, difference_P), 0.0)
    return np.where(spread, t_P, certain_P)


def set_p(own_B: Floats, draws_BD: Floats, *, limit: int, seed: int) -> float:
    """The share of relabellings of sets, within batches, in which the set called the selection has as large a lift.

    If the selection were like any other set, each of a batch's sets could as well be it. With no more than `limit` such
    choices all are used, else `limit` are drawn, the observed one among them. Exact for sets drawn alike; controls that are
    disjoint from the selection are nearly so.

    Args:
        own_B: specific effect of each batch's selection.
        draws_BD: of its matched sets; NaN where a batch has fewer.
        limit: most relabellings.
        seed: of drawn ones.
    """
    if not len(own_B):
        return math.nan
    values_BD = np.column_stack([own_B, draws_BD])
    sizes_B = (~np.isnan(values_BD)).sum(axis=1)
    if math.prod(sizes_B.tolist()) <= limit:
        chosen_PB = np.array(list(itertools.product(*(range(size) for size in sizes_B))))
    else:
        chosen_PB = (np.random.default_rng(seed).random((limit, len(own_B))) * sizes_B).astype(int)
        chosen_PB[0] = 0
    # Present draws to the front, so that any number below the size of a batch is one of its sets.
    values_BD = np.take_along_axis(values_BD, np.isnan(values_BD).argsort(axis=1, kind="stable"), axis=1)
    picked_PB = values_BD[np.arange(len(own_B)), chosen_PB]
    totals_B = np.nansum(values_BD, axis=1)
    lifts_P = (picked_PB - (totals_B - picked_PB) / np.maximum(1, sizes_B - 1)).mean(axis=1)
    return _share_as_large(lifts_P)


def _share_as_large(values_P: Floats) -> float:
    """The share of values that reach the first one, which is itself among them."""
    first = float(values_P[0])
    margin = _ROUNDING * max(1.0, abs(first)) if math.isfinite(first) else 0.0
    return float((values_P >= first - margin).mean())


def holm(p_B: Floats) -> Floats:
    """P corrected for their number, step down; NaN stays NaN."""
    corrected_B = np.full(len(p_B), math.nan)
    known = np.flatnonzero(~np.isnan(p_B))
    in_order = known[np.argsort(p_B[known], kind="stable")]
    factors = len(known) - np.arange(len(known))
    corrected_B[in_order] = np.minimum(1.0, np.maximum.accumulate(p_B[in_order] * factors))
    return corrected_B
