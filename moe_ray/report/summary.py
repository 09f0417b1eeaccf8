"""The summary of a run as plain values: what `summary.json` holds.

Shape suffixes: L MoE layers, E experts.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pandas as pd

from moe_ray.experts import ExpertMasks


def build_summary(
    *,
    masks: ExpertMasks,
    num_examples: int,
    num_experts_per_tok: int,
    tuned: Mapping[str, Any],
    before: Mapping[str, Any],
    after: Mapping[str, Any],
    change: Mapping[str, Any],
    certainty: pd.DataFrame,
    pairs: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """The figures of a run, as plain values.

    Args:
        masks: of the run.
        num_examples: that were counted.
        num_experts_per_tok: the router's k.
        tuned: `trainable_parameters`, `total_parameters`, `frozen_parameters_changed`.
        before: metrics of the held-out evaluation before the repair.
        after: the same after it.
        change: after minus before, from `paired_changes`.
        certainty: from `certainty_per_batch`.
        pairs: how many pairs were kept and dropped; None = no filter.
    """
    _, num_layers, num_experts = masks.masks_BLE.shape
    return {
        "batches": len(masks.batch_idx),
        "examples": num_examples,
        "num_layers": num_layers,
        "num_experts": num_experts,
        "num_experts_per_tok": num_experts_per_tok,
        "union_experts": len(masks.union_experts),
        "trainable_parameters": tuned["trainable_parameters"],
        "total_parameters": tuned["total_parameters"],
        "per_batch_unsafe_experts": {
            str(batch): [str(expert) for expert in masks.selected[batch]] for batch in masks.batch_idx
        },
        "empty_layers_per_batch": {str(batch): list(masks.empty_layers(batch)) for batch in masks.batch_idx},
        "short_layers_per_batch": {
            str(batch): list(masks.short_layers(batch, num_experts_per_tok)) for batch in masks.batch_idx
        },
        "untrained_batches": sorted(set(masks.batch_idx) - set(masks.trained_batches)),
        "batches_without_significance": certainty.loc[certainty["is_significant"].eq(False), "batch_idx"].tolist(),
        "before": dict(before),
        "after": dict(after),
        "change": dict(change),
        "pairs": None if pairs is None else dict(pairs),
        "frozen_parameters_changed": tuned["frozen_parameters_changed"],
    }
