"""What is to be answered: the job as plain values, and its rows as processes get them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa

from moe_ray.config.evaluate import EvaluateConfig
from moe_ray.config.model import ModelConfig
from moe_ray.experts import ShortLayers


@dataclass(frozen=True, kw_only=True)
class AnswerJob:
    """What every actor needs to know; plain values.

    Attributes:
        model: which model.
        config: lengths and sizes.
        run_url: the run directory.
        parts: its folder that gets the parts.
        adapter: its folder of learned experts; None = the base model.
        masks: its folder of the batches' masks; None = natural routing only.
        count: also count the prompts' routing, where it is natural, and keep what is said first to safe ones.
        first_of: folder of the parts of a finished job whose first tokens are looked at; None = the model's own.
        short_layers: for masked and union routing, `finetune.short_layers`.
        after_thought: the model is asked for answers without a thought.
    """

    model: ModelConfig
    config: EvaluateConfig
    run_url: str
    parts: str
    adapter: str | None = None
    masks: str | None = None
    count: bool = False
    first_of: str | None = None
    short_layers: ShortLayers = "allowed_only"
    after_thought: bool = False


def blocks_of(table: pa.Table, rows: int) -> list[dict[str, np.ndarray[Any, Any]]]:
    """The table's columns in blocks of at most `rows` rows."""
    blocks = (table.slice(start, rows) for start in range(0, len(table), rows))
    return [{name: block[name].to_numpy() for name in block.column_names} for block in blocks]


def as_table(frame: pd.DataFrame) -> pa.Table:
    """The frame as Arrow, in which text columns are text even where every value is missing."""
    texts = {name: "string" for name in ("target", "pair") if name in frame}
    return pa.Table.from_pandas(frame.astype(texts), preserve_index=False)
