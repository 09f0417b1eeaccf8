"""Every figure of a run's page, by the name that the page asks for."""

from __future__ import annotations

from collections.abc import Sequence

from moe_ray.identification.overlap import batch_overlap
from moe_ray.report.html import comparison_figures, figures
from moe_ray.report.html.experts import (
    RiskGrids,
    batches_compared,
    scale_limit,
    threshold_drawn,
    union_by_settings,
)
from moe_ray.report.html.held_out import HeldOutPart
from moe_ray.report.html.studies import sweep_map
from moe_ray.run_directory import SWEEP, RunDirectory
from moe_ray.studies.pareto import pareto_front
from moe_ray.studies.transfer import transfer_matrix


def draw_run(run: RunDirectory, grids: RiskGrids, held_out: Sequence[HeldOutPart]) -> dict[str, str]:
    """SVG text by name; what a run has no data for is not drawn.

    Args:
        run: whose figures they are.
        grids: from `risk_grids`.
        held_out: from `held_out_parts`.
    """
    return {
        **_held_out_figures(held_out),
        **_risk_figures(run, grids),
        **_selection_figures(run),
        **_training_figures(run),
        **_comparison_figures(run),
    }


def _held_out_figures(parts: Sequence[HeldOutPart]) -> dict[str, str]:
    drawn = {}
    for part in parts:
        title, rates = f"Refusal rates, {part.overall.title}", part.overall.rates
        drawn[part.overall.figure] = figures.before_after(part.overall.figure, title, rates, what="refused")
        for table in part.by_category:
            title = f"{table.title} by category"
            drawn[table.figure] = figures.before_after(table.figure, title, table.rates, what=table.title)
    return drawn


def _risk_figures(run: RunDirectory, grids: RiskGrids) -> dict[str, str]:
    """The mean over all batches on a scale of its own, and single batches on one scale."""
    masks, overall = run.masks, grids.overall_LE
    title = "Mean risk difference by layer and expert"
    limit = scale_limit([overall])
    drawn = {
        "risk_overall": figures.heat_map("risk_overall", title, overall, masks.union, masks.layers, limit=limit),
    }
    limit = scale_limit(list(grids.by_batch.values()))
    for batch, grid in grids.by_batch.items():
        name, title = f"risk_batch_{batch}", f"Risk difference of batch {batch}"
        drawn[name] = figures.heat_map(name, title, grid, masks[batch], masks.layers, limit=limit, is_small=True)
    return drawn


def _selection_figures(run: RunDirectory) -> dict[str, str]:
    drawn = {}
    compared = batches_compared(run)
    if len(compared) > 1:
        table = batch_overlap(run.masks)
        table = table[table["batch_a"].isin(compared) & table["batch_b"].isin(compared)]
        title = "Jaccard index of the batches' unsafe experts"
        drawn["overlap"] = figures.overlap("overlap", title, table, compared)
    if run.by_category["category"].nunique() > 1:
        title = "Unsafe experts by category"
        drawn["categories"] = figures.experts_by_category("categories", title, run.by_category)
    drawn["union_growth"] = figures.union_growth(
        "union_growth",
        "Experts in the union over threshold and top_k",
        union_by_settings(run),
        *threshold_drawn(run.identify_config),
    )
    return drawn


def _training_figures(run: RunDirectory) -> dict[str, str]:
    drawn = {}
    shown, manifest = sweep_map(run), run.manifest(SWEEP)
    if shown is not None and manifest is not None:
        drawn["sweep"] = figures.trials("sweep", f"{manifest['notes']['objective']} of the sweep's trials", shown)
    if run.trials is not None and pareto_front(run.trials).any():
        title = "Unsafe prompts refused, and what that costs, of the sweep's trials"
        drawn["pareto"] = figures.refusal_against_cost("pareto", title, run.trials)
    if run.history is not None:
        title = "Training loss and gradient norm by step"
        drawn["training"] = figures.training_curves("training", title, run.history)
    return drawn


def _comparison_figures(run: RunDirectory) -> dict[str, str]:
    drawn = {}
    if run.comparison is not None and run.comparison[0]["share"].nunique() > 1:
        title = "Unsafe prompts refused by every arm, over its steps"
        drawn["baselines"] = comparison_figures.curves("baselines", title, run.comparison[0])
    if run.transfer is not None:
        for name, title, figure in (
            ("transfer_unsafe", "Unsafe prompts refused, by trained and tested category", "unsafe_refusal_rate"),
            ("transfer_safe", "Rise of the loss on safe answers, by trained and tested category", "safe_target_loss"),
        ):
            drawn[name] = comparison_figures.transfer(name, title, transfer_matrix(run.transfer, figure))
    return drawn
