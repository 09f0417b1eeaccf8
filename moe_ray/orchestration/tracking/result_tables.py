"""A run's results in the forms that MLflow shows: figures with their intervals as metrics, the rest as tables."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import pandas as pd

from moe_ray.orchestration.tracking.mlflow_run import Tracker
from moe_ray.report.certainty_text import known_significance
from moe_ray.report.run_text import outcome_tables
from moe_ray.run_directory import WHENS

_TABLES = "tables"
_BOUNDS = ("low", "high", "n")


def values_of(block: Mapping[str, Any]) -> dict[str, Any]:
    """The plain figures of a block, without their intervals."""
    return {name: item["value"] for name, item in block.items() if isinstance(item, dict) and "value" in item}


def with_intervals(block: Mapping[str, Any]) -> dict[str, Any]:
    """The figures of a block, and beside each `NAME.low` and `NAME.high`, its 95% interval, and `NAME.n` where known."""
    figures = values_of(block)
    for name in list(figures):
        figures |= {f"{name}.{key}": block[name][key] for key in _BOUNDS if block[name].get(key) is not None}
    return figures


def significant_batches(certainty: pd.DataFrame) -> dict[str, int]:
    """In how many batches at least one selected expert is significant, and how many were tested; empty = none was."""
    tested = known_significance(certainty)
    return {} if tested.empty else {"batches_significant": int(tested.sum()), "batches_tested": len(tested)}


def result_tables(summary: Mapping[str, Any]) -> dict[str, pd.DataFrame]:
    """Tables by name: before and after, by category, and a row per batch.

    Args:
        summary: what `summary.json` holds.
    """
    first, *others = outcome_tables(summary)
    tables = {"before_and_after": first[1].rename(columns={"": "figure"}), "batches": batch_rows(summary)}
    for title, table in others:
        name = "".join(letter if letter.isalnum() else "_" for letter in title.partition(",")[0].lower())
        tables[name if name not in tables else f"{name}_{len(tables)}"] = table
    return tables


def batch_rows(summary: Mapping[str, Any]) -> pd.DataFrame:
    """A row per batch: `batch_idx`, `unsafe_experts`, and its held-out figures as `before.NAME` and `after.NAME`."""
    rows = []
    for batch, experts in summary["per_batch_unsafe_experts"].items():
        row: dict[str, Any] = {"batch_idx": int(batch), "unsafe_experts": len(experts)}
        for when in WHENS:
            figures = with_intervals(summary[when].get("per_batch", {}).get(batch, {}))
            row |= {f"{when}.{name}": value for name, value in figures.items()}
        rows.append(row)
    return pd.DataFrame(rows)


def log_tables(tracker: Tracker, tables: Mapping[str, pd.DataFrame]) -> None:
    """Tables as `mlflow.load_table` and MLflow's pages read them; those of an earlier try at this run are replaced.

    `MlflowClient.log_table` appends to a table that is there, so a run that was gone on with would have rows twice.
    """
    for name, table in tables.items():
        content = {"columns": [str(column) for column in table.columns], "data": json.loads(_rows(table))}
        tracker.log_bytes(f"{name}.json", json.dumps(content).encode(), _TABLES)
    listed = [{"path": f"{_TABLES}/{name}.json", "type": "table"} for name in tables]
    tracker.log_tags({"mlflow.loggedArtifacts": json.dumps(listed)})


def _rows(table: pd.DataFrame) -> str:
    """Lists of plain values, null where nothing was measured."""
    return str(table.to_json(orient="values"))
