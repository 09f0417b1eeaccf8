"""What the harnesses' tasks say of both models, as table rows and in words."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pandas as pd

from moe_ray.report.format import Figure, decimal, difference, has_interval, is_significant, rate
from moe_ray.report.printable import printable

_DIGITS = 3


def harness_rows(notes: Mapping[str, Any]) -> pd.DataFrame:
    """A row of text per task and metric; changes of rates are in points.

    Args:
        notes: of the stage's manifest, or `summary["harness"]`.
    """
    return pd.DataFrame(
        [
            {
                "task": printable(row["task"]),
                "metric": printable(row["metric"]),
                "before": _shown(row, "before"),
                "after": _shown(row, "after"),
                "paired change": _change(row),
                "n": str(row["change"]["n"]),
            }
            for row in notes["figures"]
        ]
    )


def describe_harness(notes: Mapping[str, Any]) -> str:
    """Which metrics the repair changed, beyond what chance would."""
    changed = [row for row in notes["figures"] if is_significant(row["change"])]
    if not changed:
        return f"None of {len(notes['figures'])} metrics is seen to change with the repair."
    named = ", ".join(f"{printable(row['task'])} {printable(row['metric'])} ({_change(row)})" for row in changed)
    return f"{len(changed)} of {len(notes['figures'])} metrics change with the repair: {named}."


def _shown(row: Mapping[str, Any], when: str) -> str:
    return str(rate(row[when])) if row["is_rate"] else _with_interval(row[when])


def _change(row: Mapping[str, Any]) -> str:
    if row["is_rate"]:
        return str(difference(row["change"], "points").without_unit())
    return _with_interval(row["change"], signed=True)


def _with_interval(figure: Figure, *, signed: bool = False) -> str:
    assert isinstance(figure, Mapping)
    value = decimal(figure["value"], _DIGITS, signed=signed)
    if not has_interval(figure):
        return value
    low, high = (decimal(figure[end], _DIGITS, signed=signed) for end in ("low", "high"))
    return f"{value} [{low}, {high}]"
