"""The page's part on the causal check: numbers and words."""

from __future__ import annotations

from typing import Any, cast

from moe_ray.ablation.tables import clusters_of
from moe_ray.report.ablation_text import ablation_rows, batch_rows, category_rows
from moe_ray.report.format import decimal
from moe_ray.report.html.shortened import first_rows
from moe_ray.report.printable import printable
from moe_ray.run_directory import RunDirectory


def cause_part(run: RunDirectory) -> dict[str, Any] | None:
    """The verdict, a row per kind of set, category, batch and single expert; None where the check was not done."""
    notes = run.ablation
    if notes is None:
        return None
    table = ablation_rows(notes)
    experts = [] if run.ablated_experts is None else run.ablated_experts.to_dict("records")
    return {
        "in_words": printable(str(notes["in_words"])),
        "heads": list(table.columns),
        "rows": table.to_numpy().tolist(),
        "counted": clusters_of([row["category"] for row in notes["per_batch"].values()])[1],
        "categories": category_rows(notes),
        "batches": first_rows(batch_rows(notes)),
        "experts": first_rows(
            [
                {
                    "batch_idx": row["batch_idx"],
                    "category": printable(str(row["category"])),
                    "expert": row["expert"],
                    "alone": decimal(row["alone"], 2, signed=True),
                    "without_it": decimal(row["without_it"], 2, signed=True),
                }
                for row in cast("list[dict[str, Any]]", experts)
            ]
        ),
    }
