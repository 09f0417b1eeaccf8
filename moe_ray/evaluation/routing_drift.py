"""Routing drift: how far the repair moved the routing of held-out prompts.

Shape suffixes: N prompts, C clusters of prompts that are not independent, L MoE layers, E experts.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import numpy.typing as npt

from moe_ray.errors import InputError
from moe_ray.evaluation.intervals import jackknife
from moe_ray.routing.counts import RoutingCounts


def routing_drift(
    before: RoutingCounts, after: RoutingCounts, *, clusters: npt.ArrayLike | None = None
) -> dict[str, Any]:
    """How far activation rates moved, over all prompts.

    Intervals are those of the jackknife over clusters with Student's t (Efron & Tibshirani 1993, chapter 11). A model whose
    routing did not change has a drift of exactly 0. The largest change is chosen for being the largest; its interval does
    not account for that.

    Args:
        before: of the prompts.
        after: of the same prompts in the same order.
        clusters: (N,) equal values on prompts that are not independent; None = every prompt its own.

    Returns:
        `mean_absolute_change`, over layers and experts, and `largest_change`, each (value, n, low, high); the latter's
        `layer` and `expert`.

    Raises:
        InputError: the counts are not of the same prompts or not of one architecture.
    """
    same = before.counts_NLE.shape == after.counts_NLE.shape and np.array_equal(before.num_tokens, after.num_tokens)
    if not same or before.layers != after.layers:
        raise InputError("routing before and after is not of the same prompts; evaluate both on the same ones")
    ids = np.unique(np.arange(len(before)) if clusters is None else np.asarray(clusters), return_inverse=True)[1]
    moved_CLE = np.zeros((ids.max() + 1, *before.counts_NLE.shape[1:]), dtype=np.int64)
    np.add.at(moved_CLE, ids, after.counts_NLE.astype(np.int64) - before.counts_NLE)
    tokens_C = np.bincount(ids, before.num_tokens)
    change_LE = moved_CLE.sum(axis=0) / tokens_C.sum()
    row, expert = np.unravel_index(int(np.abs(change_LE).argmax()), change_LE.shape)
    with np.errstate(invalid="ignore", divide="ignore"):  # a lone cluster leaves nothing without it
        without_CLE = (moved_CLE.sum(axis=0) - moved_CLE) / (tokens_C.sum() - tokens_C)[:, None, None]
    mean = jackknife(float(np.abs(change_LE).mean()), np.abs(without_CLE).mean(axis=(1, 2)), n=len(before))
    largest = jackknife(float(change_LE[row, expert]), without_CLE[:, row, expert], n=len(before))
    return {
        "mean_absolute_change": {**mean.as_dict(), "low": None if math.isnan(mean.low) else max(0.0, mean.low)},
        "largest_change": largest.as_dict(),
        "layer": int(before.layers[int(row)]),
        "expert": int(expert),
    }
