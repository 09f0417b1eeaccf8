"""The page's table of every selected expert of every batch, and how specific the experts of each category are."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
import pandas as pd

from moe_ray.experts import Expert
from moe_ray.identification.risk_tables import batch_tables
from moe_ray.identification.selection import difference_column
from moe_ray.report.format import MISSING, decimal, rate, significant_digits
from moe_ray.report.html.shortened import shown_rows, spread_evenly
from moe_ray.report.printable import printable
from moe_ray.run_directory import RunDirectory

_MOST_EXPERTS, _MOST_CATEGORIES = 1500, 200
_SHOWN = ("ci_low", "ci_high", "p_maxt", "stability")
_NAMED = 8
"""Experts of a category that its row names."""


def selected_part(run: RunDirectory) -> dict[str, Any]:
    """A row for each batch and selected expert, with all that says how sure it is; batches spread evenly where too many."""
    sizes = {batch: len(experts) for batch, experts in run.masks.selected.items()}
    batches = run.masks.batch_idx
    mean = max(1.0, float(np.mean([sizes[batch] for batch in batches])) if batches else 1.0)
    shown = set(spread_evenly(batches, max(1, int(_MOST_EXPERTS / mean))))
    columns = [name for name in {*_SHOWN, difference_column(run.identify_config)} if name in run.risk]
    tables = batch_tables(run.risk, columns)
    rows = [row for batch, table in tables if batch in shown for row in _rows(run, batch, table)]
    rows, left_out = shown_rows(rows, _MOST_EXPERTS)
    total = sum(sizes.values())
    return {
        "rows": rows,
        "left_out": max(left_out, total - len(rows)),
        "total": total,
        "has_alone": run.ablated_experts is not None,
    }


def _rows(run: RunDirectory, batch_idx: int, table: pd.DataFrame) -> Iterable[dict[str, Any]]:
    column = difference_column(run.identify_config)
    wanted = {(expert.layer, expert.expert) for expert in run.masks.selected[batch_idx]}
    alone = _alone_in(run, batch_idx)
    is_wanted = [key in wanted for key in zip(table["layer"], table["expert"], strict=True)]
    for row in table[is_wanted].sort_values(column, ascending=False, kind="stable").to_dict("records"):
        name = str(Expert(int(row["layer"]), int(row["expert"])))
        interval = (
            f"[{decimal(row['ci_low'], 3)}, {decimal(row['ci_high'], 3)}]" if pd.notna(row.get("ci_low")) else MISSING
        )
        yield {
            "batch_idx": batch_idx,
            "category": printable(run.categories[batch_idx]),
            "name": name,
            "difference": decimal(row[column], 4, signed=True),
            "interval": interval if column == "risk_diff" else MISSING,
            "p": significant_digits(row.get("p_maxt", float("nan"))),
            "stability": str(rate(row["stability"])) if pd.notna(row.get("stability")) else MISSING,
            "alone": decimal(alone[name], 2, signed=True) if name in alone else MISSING,
        }


def _alone_in(run: RunDirectory, batch_idx: int) -> dict[str, float]:
    measured = run.ablated_experts
    if measured is None:
        return {}
    own = measured[measured["batch_idx"] == batch_idx]
    return dict(zip(own["expert"].astype(str), own["alone"].astype(float), strict=True))


def category_specificity(by_category: pd.DataFrame, batches_of: dict[str, int]) -> pd.DataFrame:
    """How much a category's experts are its own, the most specific category first.

    For an expert, s is the share of the category's batches in which it is unsafe and o the share of all other batches.
    Specificity is sum(s - o) / sum(s) over the category's experts: 1 = no other batch selects them, 0 = others select them
    as often.

    Args:
        by_category: from `expert_categories`: a row per category and expert with the number of `batches` and their `share`.
        batches_of: batches of each category.

    Returns:
        A row per category: `category`, `batches`, `experts`, `always` (experts in each of its batches), `only` (experts that
        no other category has), `specificity`, and `names` of the experts by share and risk difference.
    """
    total = sum(batches_of.values())
    selected = by_category.groupby("name")["batches"].sum()
    rows = []
    for category, table in by_category.groupby("category"):
        own = batches_of[str(category)]
        elsewhere = table["name"].map(selected) - table["batches"]
        others = elsewhere / (total - own) if total > own else elsewhere * 0.0
        shares = table["share"].sum()
        ordered = table.sort_values(["share", "risk_diff"], ascending=False, kind="stable")
        rows.append(
            {
                "category": category,
                "batches": own,
                "experts": len(table),
                "always": int((table["share"] == 1).sum()),
                "only": int((elsewhere == 0).sum()),
                "specificity": float((table["share"] - others).sum() / shares) if shares else float("nan"),
                "names": ordered["name"].tolist(),
            }
        )
    columns = ["category", "batches", "experts", "always", "only", "specificity", "names"]
    return pd.DataFrame(rows, columns=columns).sort_values(
        "specificity", ascending=False, kind="stable", ignore_index=True
    )


def categories_part(run: RunDirectory) -> dict[str, Any]:
    """A row of text per category, the most specific first; empty where there is one category only."""
    if run.by_category["category"].nunique() < 2:
        return {}
    batches_of: dict[str, int] = {}
    for batch in run.masks.batch_idx:
        batches_of[run.categories[batch]] = batches_of.get(run.categories[batch], 0) + 1
    rows = [
        {
            **row,
            "category": printable(str(row["category"])),
            "specificity": decimal(row["specificity"], 2),
            "names": row["names"][:_NAMED],
            "more": max(0, len(row["names"]) - _NAMED),
        }
        for row in category_specificity(run.by_category, batches_of).to_dict("records")
    ]
    rows, left_out = shown_rows(rows, _MOST_CATEGORIES)
    return {"rows": rows, "left_out": left_out}
