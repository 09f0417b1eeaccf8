"""Quarantine: examples that cannot be captured, each with its reason, so that the rest can.

A quarantined example is out of its batch for every later stage: its batch has fewer examples in identification, in the
pandas export and in training. A batch that loses all examples of a label has no mask and is not trained.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import pandas as pd

QUARANTINE = "quarantine.parquet"
TRUNCATED = "truncated.parquet"
COLUMNS = ("batch_idx", "in_batch_idx", "id", "label", "category", "reason", "detail")
EMPTY = "empty"
NOT_ENCODED = "not_encoded"
TOO_LONG = "too_long"
OUT_OF_MEMORY = "out_of_memory"
FORWARD_FAILED = "forward_failed"
PROCESS_DIED = "process_died"


class Rejected(NamedTuple):
    """Why an example cannot be captured: one of the reasons above, and a sentence."""

    reason: str
    detail: str


def rejected_row(example: Mapping[str, Any], rejected: Rejected) -> dict[str, Any]:
    """A row of the quarantine table."""
    return {
        **{name: example[name] for name in COLUMNS[:5]},
        "reason": rejected.reason,
        "detail": rejected.detail,
    }


def quarantine_frame(rows: Sequence[Mapping[str, Any]] | pd.DataFrame) -> pd.DataFrame:
    """Rows of `rejected_row` as a table with fixed types, ordered by batch and position, each example once."""
    frame = pd.DataFrame(rows, columns=list(COLUMNS))
    types = {name: "int64" if name.endswith("_idx") else "object" for name in COLUMNS}
    keys = ["batch_idx", "in_batch_idx"]
    return frame.astype(types).drop_duplicates(keys).sort_values(keys, ignore_index=True)


def without_quarantined(examples: pd.DataFrame, quarantined: pd.DataFrame) -> pd.DataFrame:
    """The examples that are not in quarantine, in their order."""
    return examples[~np.isin(_keys(examples), _keys(quarantined))]


def _keys(examples: pd.DataFrame) -> npt.NDArray[np.int64]:
    """Batch and place in it as one number."""
    batch_idx, in_batch_idx = (examples[name].to_numpy(dtype=np.int64) for name in ("batch_idx", "in_batch_idx"))
    keys: npt.NDArray[np.int64] = batch_idx << 32 | in_batch_idx
    return keys


def training_examples(examples: pd.DataFrame, quarantined: pd.DataFrame, truncated: pd.DataFrame) -> pd.DataFrame:
    """The examples of all batches that can be trained on: not in quarantine, and with a target.

    An example without a target is one that was too long to be answered and was counted in part.

    Args:
        examples: of the batches, a row each.
        quarantined: the capture's quarantine table.
        truncated: the same of examples that were cut.
    """
    usable = without_quarantined(examples, quarantined)
    no_target = usable[usable["target"].isna()]
    if no_target.empty:
        return usable
    cut = no_target[~no_target.index.isin(without_quarantined(no_target, truncated).index)]
    return usable.drop(index=cut.index)
