"""Scores of samples, and what they say of two models: rates or means with n and 95% interval, paired by sample."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd

from moe_ray.evaluation.intervals import clustered_mean, clustered_rate, paired_difference

COLUMNS = ("task", "metric", "sample", "value")
"""Of a table of scores: a row per task (of a group, each of its tasks), metric and sample."""


def score_table(rows: Sequence[Mapping[str, Any]]) -> pd.DataFrame:
    """Rows with `COLUMNS` as a table."""
    table = pd.DataFrame(rows, columns=list(COLUMNS))
    return table.astype({"task": str, "metric": str, "sample": str, "value": np.float64})


def plain_number(value: Any) -> float | None:
    """A score that is one number, True being 1; None for anything else, such as the parts of a perplexity."""
    if isinstance(value, bool | int | float | np.number | np.bool_):
        number = float(value)
        return number if np.isfinite(number) else None
    return None


def harness_figures(before: pd.DataFrame, after: pd.DataFrame) -> list[dict[str, Any]]:
    """A row per task and metric.

    Args:
        before: scores of the base model.
        after: of the repaired one, on the same samples.

    Returns:
        `task`, `metric`, `is_rate` (every score is 0 or 1), and `before`, `after` and `change` (after minus before), each
        with value, n, low and high.
    """
    keys = ["task", "metric", "sample"]
    rows = before.merge(after, on=keys, suffixes=("_before", "_after"), validate="one_to_one")
    found = []
    for (task, metric), group in rows.groupby(["task", "metric"], sort=False):
        values = [group[f"value_{when}"].to_numpy() for when in ("before", "after")]
        is_rate = all(np.isin(each, (0.0, 1.0)).all() for each in values)
        if is_rate:
            values = [each.astype(bool) for each in values]
            alone = [clustered_rate(each, range(len(each))).as_dict() for each in values]
        else:
            alone = [clustered_mean(each).as_dict() for each in values]
        found.append(
            {
                "task": str(task),
                "metric": str(metric),
                "is_rate": is_rate,
                "before": alone[0],
                "after": alone[1],
                "change": paired_difference(*values).as_dict(),
            }
        )
    return found
