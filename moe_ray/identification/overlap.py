"""Questions about a selection, answered as tables: categories, overlap of batches, and what moves the union.

Experts appear under the names people see, such as `L08_E42`.

Shape suffixes: B batches, L MoE layers, E experts.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import product

import numpy as np
import pandas as pd

from moe_ray.errors import InputError
from moe_ray.experts import Expert, ExpertMasks
from moe_ray.identification.risk_tables import Risk, batch_tables, mean_by_category, shape_of
from moe_ray.prompts.batches import MIXED


def categories_of_batches(batches: pd.DataFrame) -> dict[int, str]:
    """Per `batch_idx` the category of its unsafe examples, or `mixed`.

    Args:
        batches: rows with `batch_idx`, `label` and `category`, one per example.
    """
    unsafe = batches.loc[batches["label"] == "unsafe", ["batch_idx", "category"]].drop_duplicates()
    unsafe = unsafe.sort_values("batch_idx", kind="stable")
    has_one = ~unsafe["batch_idx"].duplicated(keep=False) & (unsafe["category"] != "")
    names = unsafe["category"].astype(object).where(has_one, MIXED)
    return dict(zip(unsafe["batch_idx"].tolist(), names.tolist(), strict=True))


def expert_categories(risk: Risk, masks: ExpertMasks, categories: Mapping[int, str]) -> pd.DataFrame:
    """One row per category and expert that is unsafe in at least one of its batches, the most frequent first.

    Returns:
        columns `category, name, layer, expert`; `batches`, in how many of the category's batches it is unsafe; `share`,
        of all its batches (0 to 1); `risk_diff`, mean over all of the category's batches.

    Raises:
        InputError: a batch has no category.
    """
    _check_known(masks.batch_idx, categories)
    means = mean_by_category(risk, dict(categories)).set_index(["category", "layer", "expert"])
    sizes = pd.Series([categories[batch] for batch in masks.batch_idx]).value_counts()
    pairs = [(categories[batch], *expert) for batch in masks.batch_idx for expert in masks.selected[batch]]
    seen = pd.DataFrame(pairs, columns=["category", "layer", "expert"])
    table = seen.value_counts().rename("batches").reset_index()
    table["share"] = table["batches"] / table["category"].map(sizes)
    table = table.join(means, on=["category", "layer", "expert"])
    table.insert(1, "name", [str(Expert(*pair)) for pair in zip(table["layer"], table["expert"], strict=True)])
    order = ["category", "share", "risk_diff", "layer", "expert"]
    return table.sort_values(order, ascending=[True, False, False, True, True], ignore_index=True)


def _check_known(batch_idx: Sequence[int], categories: Mapping[int, str]) -> None:
    missing = sorted(set(batch_idx) - set(categories))
    if missing:
        raise InputError(f"batches {missing[:20]} have no category; give the batches table of the same run")


def shared_experts(by_category: pd.DataFrame, *, min_share: float = 0.0) -> pd.DataFrame:
    """Experts that belong to several categories, those of most categories first.

    Args:
        by_category: from `expert_categories`.
        min_share: an expert belongs to a category when it is unsafe in more than this share of its batches.

    Returns:
        columns `name, layer, expert, num_categories`, `categories` (text, the largest share first), `batches`.
    """
    belongs = by_category[by_category["share"] > min_share].sort_values("share", ascending=False, kind="stable")
    table = belongs.groupby(["name", "layer", "expert"], as_index=False).agg(
        num_categories=("category", "nunique"), categories=("category", ", ".join), batches=("batches", "sum")
    )
    table = table[table["num_categories"] > 1]
    order = ["num_categories", "batches", "layer", "expert"]
    return table.sort_values(order, ascending=[False, False, True, True], ignore_index=True)


def batch_overlap(masks: ExpertMasks) -> pd.DataFrame:
    """One row per pair of batches: how alike their masks are.

    Chance is what two random choices with the same number of experts in each layer would share: `expected` holds the
    expected shared experts over the experts then in either, and `corrected = (jaccard - expected) / (1 - expected)` is 0
    at chance and 1 for equal masks. The expectation of the ratio is taken as the ratio of expectations.

    Returns:
        columns `batch_a, batch_b, shared, jaccard, expected, corrected`; NaN where neither batch selects any.
    """
    flat_BX = masks.masks_BLE.reshape(len(masks.batch_idx), -1).astype(np.float64)
    sizes_BL = masks.masks_BLE.sum(axis=2).astype(np.float64)
    shared_BB = flat_BX @ flat_BX.T
    chance_BB = sizes_BL @ sizes_BL.T / masks.masks_BLE.shape[2]
    sizes_B = sizes_BL.sum(axis=1)
    total_BB = sizes_B[:, None] + sizes_B
    first, second = np.triu_indices(len(sizes_B), k=1)
    shared, chance, total = (values[first, second] for values in (shared_BB, chance_BB, total_BB))
    table = pd.DataFrame({"batch_a": np.take(masks.batch_idx, first), "batch_b": np.take(masks.batch_idx, second)})
    table["shared"] = shared.astype(np.int64)
    with np.errstate(invalid="ignore", divide="ignore"):
        table["jaccard"] = shared / (total - shared)
        table["expected"] = chance / (total - chance)
        table["corrected"] = (table["jaccard"] - table["expected"]) / (1 - table["expected"])
    return table


def sweep_union(
    risk: Risk,
    *,
    thresholds: Sequence[float],
    top_ks: Sequence[int],
    reference: ExpertMasks | None = None,
    column: str = "risk_diff",
    is_relative: bool = False,
) -> pd.DataFrame:
    """One row per threshold and top_k: what the plain rule would select.

    Args:
        risk: from `identify`.
        thresholds: values of `identify.threshold`.
        top_ks: values of `identify.top_k`.
        reference: masks to compare the union with.
        column: difference to rank by.
        is_relative: thresholds are shares of a batch's largest difference, as `identify.min_share` is.

    Returns:
        columns `threshold, top_k`; `union`, experts in it; `union_share` of all experts; `per_batch`, mean experts a
        batch; `empty_batches`, with none; with a reference `kept` and `added`, experts of the union that are in the
        reference's union and that are not.
    """
    layers_of_table, num_experts = shape_of(risk)
    layers, most = np.array(layers_of_table), max(top_ks)
    # No more of a batch is kept than the largest top_k can take.
    ranked = [_ranked(table, layers, num_experts, column, most) for _, table in batch_tables(risk, [column])]
    union_of_reference = None if reference is None else reference.union.ravel()
    rows = []
    for threshold, top_k in product(thresholds, top_ks):
        units = [max(values[0], 0.0) if is_relative else 1.0 for _, values in ranked]
        chosen = [
            keys[:top_k][values[:top_k] > threshold * unit] for (keys, values), unit in zip(ranked, units, strict=True)
        ]
        union = np.zeros(len(layers) * num_experts, dtype=bool)
        union[np.concatenate(chosen)] = True
        row = {
            "threshold": threshold,
            "top_k": top_k,
            "union": int(union.sum()),
            "union_share": float(union.mean()),
            "per_batch": float(np.mean([len(keys) for keys in chosen])),
            "empty_batches": sum(not len(keys) for keys in chosen),
        }
        if union_of_reference is not None:
            row |= {"kept": int((union & union_of_reference).sum()), "added": int((union & ~union_of_reference).sum())}
        rows.append(row)
    return pd.DataFrame(rows)


def _ranked(
    table: pd.DataFrame, layers: np.ndarray, num_experts: int, column: str, most: int
) -> tuple[np.ndarray, np.ndarray]:
    """A batch's first experts as flat mask positions with their values, the largest first, ties by (layer, expert)."""
    keys = np.searchsorted(layers, table["layer"].to_numpy()) * num_experts + table["expert"].to_numpy()
    values = table[column].to_numpy()
    order = np.lexsort((keys, -values))[:most]
    return keys[order], values[order]
