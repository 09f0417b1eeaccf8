"""In which order and in how large portions held-out rows are answered, and the way back to the frame's order."""

from __future__ import annotations

import math

import pandas as pd

from moe_ray.config.auto import processes_of
from moe_ray.config.evaluate import EvaluateConfig
from moe_ray.evaluation.samples import SAMPLE

ROUTINGS = ("natural", "masked", "union")
"""Kinds of routing that examples may be answered under."""

_CHARACTERS_PER_TOKEN = 4
"""Of the messages as JSON, roughly. Only portions of work are cut by it; forward passes are cut by tokens."""

_PASSES_PER_BLOCK = 4
"""The last pass of a block is filled by what is left, and a process that is killed loses a block."""


def in_answering_order(rows: pd.DataFrame) -> pd.DataFrame:
    """The rows of `rows_to_answer` by kind of routing, and in each the longest prompts first.

    Rows of like length are then in one block, so that little of its forward passes is padding. Rows of equal length keep
    their order.
    """
    ordered = rows.assign(length=_prompt_tokens(rows)).sort_values(
        ["routing", "length"], ascending=[True, False], kind="stable"
    )
    return ordered.drop(columns="length")


def in_frame_order(answers: pd.DataFrame) -> pd.DataFrame:
    """The answers by routing, in the order of `ROUTINGS`, in each as the examples stood in the frame, and by sample."""
    ordered = answers.assign(kind=answers["routing"].map(ROUTINGS.index)).sort_values(
        ["kind", "place", SAMPLE], ignore_index=True
    )
    return ordered.drop(columns="kind")


def rows_per_block(rows: pd.DataFrame, config: EvaluateConfig) -> int:
    """How many rows a process gets at a time, and writes as one part: a few forward passes, and a share for each process.

    Args:
        rows: all that are to be answered, at least one.
        config: `tokens_per_forward`, `max_new_tokens` and `num_actors`.
    """
    tokens_per_row = _prompt_tokens(rows).mean() + config.max_new_tokens
    rows_of_passes = int(_PASSES_PER_BLOCK * config.tokens_per_forward / tokens_per_row)
    return max(1, min(rows_of_passes, math.ceil(len(rows) / processes_of(config.num_actors))))


def _prompt_tokens(rows: pd.DataFrame) -> pd.Series:
    # Plain texts have no messages: what is scored of them is their target.
    characters = rows["messages"].str.len().where(rows["messages"] != "", rows["target"].str.len())
    return characters.fillna(0) / _CHARACTERS_PER_TOKEN
