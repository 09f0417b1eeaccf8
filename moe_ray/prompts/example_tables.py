"""Examples and batches as the tables that a run stores, and back."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import pandas as pd
import pyarrow as pa

from moe_ray.prompts.batches import MIXED, Batch
from moe_ray.prompts.example_rows import EXAMPLE_SCHEMA, example_to_row, row_to_example
from moe_ray.prompts.examples import Example


def batches_to_frame(batches: Sequence[Batch]) -> pd.DataFrame:
    """One row per example: the form in which batches are stored."""
    return pd.DataFrame.from_records([row for batch in batches for row in batch.to_rows()])


def frame_to_batches(frame: pd.DataFrame) -> list[Batch]:
    """The batches that `batches_to_frame` wrote."""
    batches = []
    for batch_idx, group in frame.groupby("batch_idx", sort=True):
        examples = tuple(frame_to_examples(group.sort_values("in_batch_idx")))
        categories = {example.category for example in examples if example.label == "unsafe"}
        category = categories.pop() if len(categories) == 1 else MIXED
        batches.append(Batch(batch_idx=int(cast(int, batch_idx)), category=category or MIXED, examples=examples))
    return batches


def frame_to_examples(frame: pd.DataFrame) -> list[Example]:
    """The examples of a table's rows, in their order."""
    return [row_to_example(cast("dict[str, Any]", row)) for row in frame.to_dict("records")]


def examples_to_frame(examples: Sequence[Example]) -> pd.DataFrame:
    """One row per example."""
    return pd.DataFrame.from_records([example_to_row(example) for example in examples])


BATCH_SCHEMA = pa.schema([("batch_idx", pa.int64()), ("in_batch_idx", pa.int64()), *EXAMPLE_SCHEMA])
"""The columns of stored batches."""

BATCHES = "batches.parquet"
ROWS_PER_GROUP = 1024
"""Examples in a row group of the stored batches: what a process must load to read one of them."""
