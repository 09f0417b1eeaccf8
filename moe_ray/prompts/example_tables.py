"""Examples and batches as the tables that a run stores, and back."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any, cast

import pandas as pd

from moe_ray.prompts.batches import MIXED, Batch
from moe_ray.prompts.examples import Example


def batches_to_frame(batches: Sequence[Batch]) -> pd.DataFrame:
    """One row per example: the form in which batches are stored."""
    return pd.DataFrame.from_records(
        [
            {"batch_idx": batch.batch_idx, "in_batch_idx": position, **example_to_row(example)}
            for batch in batches
            for position, example in enumerate(batch.examples)
        ]
    )


def frame_to_batches(frame: pd.DataFrame) -> list[Batch]:
    """The batches that `batches_to_frame` wrote."""
    batches = []
    for batch_idx, group in frame.groupby("batch_idx", sort=True):
        rows = group.sort_values("in_batch_idx").to_dict("records")
        examples = tuple(row_to_example(cast("dict[str, Any]", row)) for row in rows)
        categories = {example.category for example in examples if example.label == "unsafe"}
        category = categories.pop() if len(categories) == 1 else MIXED
        batches.append(Batch(batch_idx=int(cast(int, batch_idx)), category=category or MIXED, examples=examples))
    return batches


def examples_to_frame(examples: Sequence[Example]) -> pd.DataFrame:
    """One row per example."""
    return pd.DataFrame.from_records([example_to_row(example) for example in examples])


def example_to_row(example: Example) -> dict[str, Any]:
    """An example as a flat row of plain values; messages as JSON text."""
    return {
        "id": example.id,
        "label": example.label,
        "category": example.category,
        "messages": json.dumps([dict(message) for message in example.messages], ensure_ascii=False),
        "response": example.response,
        "target": example.target,
        "target_complete": example.target_complete,
        "pair": example.pair,
        "split": example.split,
    }


def row_to_example(row: Mapping[str, Any]) -> Example:
    """The example that `example_to_row` wrote; missing text may be None or NaN."""

    def text(name: str) -> Any:
        value = row.get(name)
        return value if isinstance(value, str) else None

    return Example(
        id=row["id"],
        label=row["label"],
        category=row["category"],
        messages=tuple(json.loads(row["messages"])),
        response=text("response"),
        target=text("target"),
        target_complete=bool(row["target_complete"]),
        pair=text("pair"),
        split=text("split"),
    )


BATCHES = "batches.parquet"

ROWS_PER_GROUP = 1024

"""Examples in a row group of the stored batches: what a process must load to read one of them."""
