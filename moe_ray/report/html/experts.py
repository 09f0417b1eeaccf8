"""The page's part on experts: how they spread over layers, batches and categories, and how certain they are.

Everything here is numbers and words; `run_figures` draws them.

Shape suffixes: B batches, L MoE layers, E experts.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import numpy.typing as npt
import pandas as pd

from moe_ray.config.identify import IdentifyConfig
from moe_ray.config.report import ReportConfig
from moe_ray.experts import Expert, ExpertMasks
from moe_ray.identification.comparisons import COMPARISONS, is_relative
from moe_ray.identification.overlap import batch_overlap, shared_experts, sweep_union
from moe_ray.identification.risk_tables import Risk, aggregate_risk, batch_table
from moe_ray.identification.selection import SCORE_COLUMN, difference_column, difference_name
from moe_ray.report.ablation_text import alone_of
from moe_ray.report.format import decimal, rate, significant_digits
from moe_ray.report.html.shortened import first_rows, spread_evenly
from moe_ray.report.printable import printable
from moe_ray.run_directory import RunDirectory

_TOP_EXPERTS, _BATCHES_IN_SIGHT, _MOST_BATCHES_COMPARED = 200, 6, 120
_TOP_KS = (10, 25, 50, 100)
_SMALLEST_SCALE = 1e-3
"""A heat map of nothing but zeros still needs a scale."""


@dataclass(frozen=True, kw_only=True)
class RiskGrids:
    """The risk differences that a page's maps show, read from the risk table once for all its parts.

    Attributes:
        overall_LE: their mean over all batches.
        by_batch: (L, E) of every batch that gets a map of its own.
    """

    overall_LE: npt.NDArray[np.float64]
    by_batch: Mapping[int, npt.NDArray[np.float64]]


def risk_grids(run: RunDirectory, config: ReportConfig) -> RiskGrids:
    """Reads what the maps show, by the run's weighting, of batches picked evenly from all."""
    masks, column = run.masks, SCORE_COLUMN[run.identify_config.weighting]
    drawn = spread_evenly(masks.batch_idx, config.batches)
    return RiskGrids(
        overall_LE=risk_grid(run.risk, masks, column=column),
        by_batch={batch: risk_grid(run.risk, masks, batch, column=column) for batch in drawn},
    )


def experts_part(run: RunDirectory, grids: RiskGrids) -> dict[str, Any]:
    """Tables and captions: experts, batches, overlap, categories, and what moves the union."""
    masks = run.masks
    batches = [
        {
            "batch_idx": batch,
            "category": printable(run.categories[batch]),
            "experts": len(masks.selected[batch]),
            "figure": f"risk_batch_{batch}",
        }
        for batch in grids.by_batch
    ]
    return {
        "top": _top_experts(run),
        "batches": batches[:_BATCHES_IN_SIGHT],
        "more_batches": batches[_BATCHES_IN_SIGHT:],
        "left_out": len(masks.batch_idx) - len(batches),
        "batch_limit": significant_digits(scale_limit(list(grids.by_batch.values()))),
        "by_weight": run.identify_config.weighting == "activation",
        "overlap": _overlap_part(run),
        "categories": _categories_part(run),
        "growth": _growth_part(run),
    }


def batches_compared(run: RunDirectory) -> list[int]:
    """The batches between which overlap is drawn, ordered by category."""
    shown = spread_evenly(run.masks.batch_idx, _MOST_BATCHES_COMPARED)
    return sorted(shown, key=lambda batch: (run.categories[batch], batch))


def risk_grid(
    risk: Risk, masks: ExpertMasks, batch_idx: int | None = None, *, column: str = "risk_diff"
) -> npt.NDArray[np.float64]:
    """(L, E) risk differences of a batch, or their mean over all batches.

    Args:
        risk: from `identify`.
        masks: whose layers are the rows.
        batch_idx: of the batch; None = mean over all.
        column: of the risk table, see `SCORE_COLUMN`.
    """
    rows = aggregate_risk(risk) if batch_idx is None else batch_table(risk, batch_idx)
    means = rows.set_index(["layer", "expert"])[column].unstack("expert")
    return np.asarray(means.reindex(index=masks.layers), dtype=np.float64)


def map_values(grid_LE: npt.NDArray[np.float64], layers: Sequence[int]) -> dict[str, str]:
    """A map's numbers as a page's script reads them: ten-thousandths row by row, and the layers' indices.

    Args:
        grid_LE: (L, E) differences of fractions.
        layers: L decoder layer indices.
    """
    ten_thousandths = np.rint(np.nan_to_num(grid_LE) * 1e4).astype(int)
    return {"values": " ".join(map(str, ten_thousandths.ravel())), "layers": " ".join(map(str, layers))}


def maps_part(grids: RiskGrids, layers: Sequence[int]) -> dict[str, dict[str, str]]:
    """The numbers behind each map of experts, by the figure's name."""
    single = {f"risk_batch_{batch}": grid_LE for batch, grid_LE in grids.by_batch.items()}
    return {name: map_values(grid_LE, layers) for name, grid_LE in {"risk_overall": grids.overall_LE, **single}.items()}


def scale_limit(grids: list[npt.NDArray[np.float64]]) -> float:
    """The largest magnitude in any of the grids: a scale from minus this to this has zero in its middle."""
    return max([float(np.nanmax(np.abs(grid_LE))) for grid_LE in grids] + [_SMALLEST_SCALE])


def union_by_settings(run: RunDirectory) -> pd.DataFrame:
    """How many experts the plain rule would put in the union, for thresholds up to the largest difference and some top_k."""
    selection = run.identify_config
    relative = is_relative(selection)
    largest = 1.0 if relative else max(float(run.certainty["largest_risk_diff"].max()), _SMALLEST_SCALE)
    thresholds = sorted({*np.linspace(0, largest, 12).round(4).tolist(), threshold_drawn(selection)[1]})
    return sweep_union(
        run.risk,
        thresholds=thresholds,
        top_ks=sorted({*_TOP_KS, selection.top_k}),
        column=difference_column(selection),
        is_relative=relative,
    )


def threshold_drawn(selection: IdentifyConfig) -> tuple[str, float]:
    """Name and value of the setting that the rule cuts at."""
    name = "min_share" if is_relative(selection) else "threshold"
    return f"identify.{name}", getattr(selection, name)


def certainty_rows(run: RunDirectory, certainty: pd.DataFrame) -> dict[str, Any]:
    """The rows that say how certain each batch's selection is.

    Args:
        run: whose batches they are.
        certainty: from `certainty_per_batch`.
    """
    rows = [
        {
            **row,
            "category": printable(run.categories[row["batch_idx"]]),
            "smallest_p_maxt": significant_digits(row["smallest_p_maxt"]),
            "median_stability": str(rate(row["median_stability"])),
            "certifiable": "none" if math.isinf(row["certifiable"]) else decimal(row["certifiable"]),
        }
        for row in cast("list[dict[str, Any]]", certainty.to_dict("records"))
    ]
    return first_rows(rows)


def _top_experts(run: RunDirectory) -> list[dict[str, Any]]:
    column = SCORE_COLUMN[run.identify_config.weighting]
    ordered = aggregate_risk(run.risk).sort_values([column, "layer", "expert"], ascending=[False, True, True])
    table = ordered.head(_TOP_EXPERTS)
    num_batches_LE = run.masks.masks_BLE.sum(axis=0)
    rows = []
    for row in cast("list[dict[str, Any]]", table.to_dict("records")):
        expert = Expert(int(row["layer"]), int(row["expert"]))
        rows.append(
            {
                "name": str(expert),
                "risk_diff": decimal(row[column], 4, signed=True),
                "safe": str(rate(row["a_safe_n"])),
                "unsafe": str(rate(row["a_unsafe_n"])),
                # The mask's rows are MoE layers in order, which a decoder with dense layers numbers otherwise.
                "batches": int(num_batches_LE[run.masks.layers.index(expert.layer), expert.expert]),
            }
        )
    alone = alone_of([str(row["name"]) for row in rows], run.ablated_experts)
    return [{**row, "alone": text} for row, text in zip(rows, alone, strict=True)]


def _overlap_part(run: RunDirectory) -> dict[str, Any] | None:
    num_batches = len(run.masks.batch_idx)
    if num_batches < 2:
        return None
    table = batch_overlap(run.masks)
    means = {name: decimal(table[name].mean(), 2) for name in ("jaccard", "expected")}
    return {"pairs": len(table), "left_out": num_batches - len(batches_compared(run)), **means}


def _categories_part(run: RunDirectory) -> dict[str, Any] | None:
    num_categories = run.by_category["category"].nunique()
    if num_categories < 2:
        return None
    shared = shared_experts(run.by_category)
    return {
        "categories": num_categories,
        "shared": len(shared),
        "union": len(run.masks.union_experts),
        "rows": [
            {**row, "categories": printable(str(row["categories"]))}
            for row in cast("list[dict[str, Any]]", shared.head(_TOP_EXPERTS).to_dict("records"))
        ],
    }


def _growth_part(run: RunDirectory) -> dict[str, Any]:
    selection = run.identify_config
    is_plain = selection.rule in ("risk_diff", *COMPARISONS) and not selection.alpha and not selection.stability
    return {
        "is_plain": is_plain,
        "total": int(run.masks.union.size),
        "threshold": threshold_drawn(selection)[0].partition(".")[2],
        "what": difference_name(selection),
    }
