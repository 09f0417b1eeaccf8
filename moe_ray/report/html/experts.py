"""The page's part on experts: how they spread over layers, batches and categories, and how certain they are."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import numpy as np
import pandas as pd

from moe_ray.config.report import ReportConfig
from moe_ray.experts import Expert
from moe_ray.identification.overlap import batch_overlap, shared_experts, sweep_union
from moe_ray.identification.risk import aggregate_risk
from moe_ray.report.html import figures
from moe_ray.report.printable import printable
from moe_ray.run_directory import RunDirectory

_TOP_EXPERTS, _BATCHES_IN_SIGHT, _MOST_BATCHES_COMPARED, _MOST_ROWS = 20, 6, 120, 200

_TOP_KS = (10, 25, 50, 100)


def _experts_part(drawn: dict[str, str], run: RunDirectory, config: ReportConfig) -> dict[str, Any]:
    masks, risk = run.masks, run.risk
    overall = figures.risk_grid(risk, masks)
    limit = max(float(np.nanmax(np.abs(overall))), 1e-3)
    drawn["risk_overall"] = figures.heat_map(
        "risk_overall", "Mean risk difference by layer and expert", overall, masks.union, masks.layers, limit=limit
    )
    shown = _spread(masks.batch_idx, config.batches)
    grids = {batch: figures.risk_grid(risk, masks, batch) for batch in shown}
    own_limit = max([float(np.nanmax(np.abs(grid))) for grid in grids.values()] + [1e-3])
    for batch, grid in grids.items():
        name = f"risk_batch_{batch}"
        text = f"Risk difference of batch {batch}"
        drawn[name] = figures.heat_map(name, text, grid, masks[batch], masks.layers, limit=own_limit, is_small=True)
    batches = [
        {
            "batch_idx": b,
            "category": printable(run.categories[b]),
            "experts": len(masks.selected[b]),
            "figure": f"risk_batch_{b}",
        }
        for b in shown
    ]
    return {
        "top": _top_experts(run),
        "batches": batches[:_BATCHES_IN_SIGHT],
        "more_batches": batches[_BATCHES_IN_SIGHT:],
        "left_out": len(masks.batch_idx) - len(shown),
        "batch_limit": own_limit,
        "overlap": _overlap_part(drawn, run),
        "categories": _categories_part(drawn, run),
        "growth": _growth_part(drawn, run),
    }


def _spread(items: Sequence[int], limit: int) -> list[int]:
    """At most `limit` items, taken evenly over the list."""
    return [items[place * len(items) // limit] for place in range(limit)] if len(items) > limit else list(items)


def _top_experts(run: RunDirectory) -> list[dict[str, Any]]:
    table = aggregate_risk(run.risk).head(_TOP_EXPERTS)
    in_batches = run.masks.masks_BLE.sum(axis=0)
    rows = []
    for row in cast("list[dict[str, Any]]", table.to_dict("records")):
        expert = Expert(int(row["layer"]), int(row["expert"]))
        place = run.masks.layers.index(expert.layer), expert.expert
        rows.append({"name": str(expert), "batches": int(in_batches[place]), **row})
    return rows


def _overlap_part(drawn: dict[str, str], run: RunDirectory) -> dict[str, Any] | None:
    kept = _spread(run.masks.batch_idx, _MOST_BATCHES_COMPARED)
    if len(kept) < 2:
        return None
    table = batch_overlap(run.masks)
    shown = table[table["batch_a"].isin(kept) & table["batch_b"].isin(kept)]
    order = sorted(kept, key=lambda batch: (run.categories[batch], batch))
    drawn["overlap"] = figures.overlap("overlap", "Jaccard index of the batches' unsafe experts", shown, order)
    means = {name: float(table[name].mean()) for name in ("jaccard", "expected", "corrected")}
    return {"pairs": len(table), "left_out": len(run.masks.batch_idx) - len(kept), **means}


def _categories_part(drawn: dict[str, str], run: RunDirectory) -> dict[str, Any] | None:
    by_category = run.by_category
    if by_category["category"].nunique() < 2:
        return None
    drawn["categories"] = figures.experts_by_category("categories", "Unsafe experts by category", by_category)
    shared = shared_experts(by_category)
    return {
        "categories": by_category["category"].nunique(),
        "shared": len(shared),
        "union": len(run.masks.union_experts),
        "rows": [
            {**row, "categories": printable(str(row["categories"]))}
            for row in cast("list[dict[str, Any]]", shared.head(_TOP_EXPERTS).to_dict("records"))
        ],
    }


def _growth_part(drawn: dict[str, str], run: RunDirectory) -> dict[str, Any]:
    selection = run.identify_config
    largest = float(run.risk["risk_diff"].max())
    thresholds = sorted({*np.linspace(0, max(largest, 1e-3), 12).round(4).tolist(), selection.threshold})
    table = sweep_union(run.risk, thresholds=thresholds, top_ks=sorted({*_TOP_KS, selection.top_k}))
    drawn["union_growth"] = figures.union_growth(
        "union_growth", "Experts in the union over threshold and top_k", table, selection.threshold
    )
    is_plain = selection.rule == "risk_diff" and not selection.alpha and not selection.stability
    return {"is_plain": is_plain, "total": int(run.masks.union.size)}


def _certainty_rows(run: RunDirectory, certainty: pd.DataFrame) -> list[dict[str, Any]]:
    rows = cast("list[dict[str, Any]]", certainty.to_dict("records"))
    return [{**row, "category": printable(run.categories[row["batch_idx"]])} for row in rows]


def _limited(rows: list[dict[str, Any]]) -> dict[str, Any]:
    return {"rows": rows[:_MOST_ROWS], "left_out": max(0, len(rows) - _MOST_ROWS)}
