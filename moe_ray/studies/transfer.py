"""Transfer between categories: trained on one alone, what becomes of the others."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pandas as pd

from moe_ray.evaluation.metrics import paired_changes, summarise
from moe_ray.studies.comparison import ArmResult, columns_of


def transfer_table(base: ArmResult, by_category: Mapping[str, ArmResult]) -> pd.DataFrame:
    """One row per category that trained and category that was tested.

    Args:
        base: of the base model.
        by_category: per category, the arm in which its batches alone trained; after all steps.

    Returns:
        columns `trained, tested, is_own`; `unsafe_refusal_rate`, `safe_refusal_rate` and, as rises above the base model,
        `unsafe_rise` (of the refusal rate) and `safe_target_loss` (nats per token), each with `_low`, `_high`, `_n`.
        Intervals are 95%, over prompts. Examples without a category are left out.
    """
    num_seeds = max(len(result.measured) for result in by_category.values())
    before = base.at(1.0, num_seeds).answers
    rows = []
    for trained, result in by_category.items():
        after = result.at(1.0, num_seeds).answers
        for tested in sorted(set(after["category"].dropna()) - {""}):
            first, second = (
                answers[answers["category"] == tested].assign(category="", batch_idx=0) for answers in (before, after)
            )
            rates, change = summarise(second), paired_changes(first, second)
            safe = [answers[answers["label"] == "safe"] for answers in (first, second)]
            lost = paired_changes(*safe)["target_loss"] if len(safe[0]) else None
            row: dict[str, Any] = {"trained": trained, "tested": tested, "is_own": trained == tested}
            for name in ("unsafe_refusal_rate", "safe_refusal_rate"):
                row |= columns_of(name, rates[name], num_seeds)
            row |= columns_of("unsafe_rise", change["unsafe_refusal_rate"], num_seeds)
            rows.append(row | columns_of("safe_target_loss", lost, num_seeds))
    return pd.DataFrame(rows)


def transfer_matrix(table: pd.DataFrame, name: str) -> pd.DataFrame:
    """A figure's values, a row for each category that trained and a column for each that was tested, in one order.

    Args:
        table: from `transfer_table`.
        name: of the figure.
    """
    return table.pivot(index="trained", columns="tested", values=name)
