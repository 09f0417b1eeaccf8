"""How well a selection finds what was planted, where that is known.

Shape suffixes: L MoE layers, E experts.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from moe_ray.errors import InputError
from moe_ray.experts import ExpertMasks, Mask
from moe_ray.organisms.truth import Truth, has_truth, read_truth

logger = logging.getLogger(__name__)


def recovery(truth: Truth, masks: ExpertMasks, categories: Mapping[int, str]) -> dict[str, Any]:
    """Precision and recall of each batch's experts against the planted ones of its category, as plain values.

    Args:
        truth: Of the model.
        masks: Of the batches.
        categories: Each batch's category; batches of others than the truth knows are not counted.

    Returns:
        `kind`, `per_category` (its figures by category) and the figures over all batches: `batches`, and means over them:
        `selected`, `planted` and `decoys` (experts), `found` and `decoys_selected` (of those, the selected ones),
        `precision` (of the selected, the share that is planted; None where nothing was selected anywhere) and `recall` (of
        the planted, the share that is selected; None where nothing is planted).
    """
    by_category: dict[str, list[int]] = {category: [] for category in truth.categories}
    for batch_idx in masks.batch_idx:
        if categories.get(batch_idx) in by_category:
            by_category[categories[batch_idx]].append(batch_idx)
    counts = {
        category: [_counted(truth, category, masks[batch_idx]) for batch_idx in batches]
        for category, batches in by_category.items()
    }
    return {
        "kind": truth.kind,
        **_figures([count for batches in counts.values() for count in batches]),
        "per_category": {category: _figures(batches) for category, batches in counts.items() if batches},
    }


def known_recovery(model_path: str, masks: ExpertMasks, categories: Mapping[int, str]) -> dict[str, Any] | None:
    """`recovery` where the model's folder says what is true of it, and knows a category of the batches; else None."""
    if not has_truth(model_path):
        return None
    try:
        truth = read_truth(model_path)
    except InputError as error:
        logger.warning("the selection is not compared with a truth: %s", error)
        return None
    if masks.masks_BLE.shape[1:] != (truth.num_layers, truth.num_experts):
        return None
    found = recovery(truth, masks, categories)
    return found if found["batches"] else None


def average_precision(scores_LE: npt.NDArray[np.floating[Any]], planted_LE: Mask) -> float:
    """The mean, over planted experts, of the precision of the list that ends with each, experts ordered by score.

    1 = the planted experts come first. Ties count against the score: an expert comes after all others of its score.

    Args:
        scores_LE: The higher, the more an expert is suspected; NaN = not at all.
        planted_LE: (L, E) bool, at least one True.
    """
    ranks = np.sort(ranks_of(scores_LE, planted_LE))
    return float(np.mean(np.arange(1, len(ranks) + 1) / ranks))


def ranks_of(scores_LE: npt.NDArray[np.floating[Any]], planted_LE: Mask) -> npt.NDArray[np.int64]:
    """The ranks of the planted experts, 1 = the highest score; among equal scores those not planted come first."""
    scores = np.nan_to_num(scores_LE.ravel(), nan=-np.inf)
    order = np.lexsort((planted_LE.ravel(), -scores))
    return np.flatnonzero(planted_LE.ravel()[order]) + 1


def _counted(truth: Truth, category: str, mask_LE: Mask) -> dict[str, int]:
    planted_LE, decoys_LE = truth.planted_mask(category), truth.decoy_mask(category)
    return {
        "selected": int(mask_LE.sum()),
        "planted": int(planted_LE.sum()),
        "decoys": int(decoys_LE.sum()),
        "found": int((mask_LE & planted_LE).sum()),
        "decoys_selected": int((mask_LE & decoys_LE).sum()),
    }


def _figures(batches: Sequence[Mapping[str, int]]) -> dict[str, Any]:
    names = ("selected", "planted", "decoys", "found", "decoys_selected")
    precisions = [batch["found"] / batch["selected"] for batch in batches if batch["selected"]]
    recalls = [batch["found"] / batch["planted"] for batch in batches if batch["planted"]]
    return {
        "batches": len(batches),
        **{name: float(np.mean([batch[name] for batch in batches])) if batches else 0.0 for name in names},
        "precision": float(np.mean(precisions)) if precisions else None,
        "recall": float(np.mean(recalls)) if recalls else None,
    }
