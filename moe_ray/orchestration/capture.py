"""Distributed routing capture: Ray Data actors count, and write what they counted as they go.

Each actor call writes its examples' counts as one Parquet part, whole or not at all, so a capture that is killed goes on
with the batches that have no part yet. Through Ray's object store go prompts one way and a few numbers the other.
"""

from __future__ import annotations

import json
from contextlib import ExitStack
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import ray
import ray.data

from moe_ray.artifacts import Folder, content_hash, counts_to_table, table_to_counts
from moe_ray.chat import TokenizedRow, encode_answer, encode_prompt, pad_token_id
from moe_ray.config import CaptureConfig, ModelConfig
from moe_ray.orchestration.actors import ModelHolder
from moe_ray.orchestration.cluster import require_cpus
from moe_ray.orchestration.progress import progress
from moe_ray.routing import RoutingCounts, concat_counts, count_rows, counting, counts_from_forward


class CaptureActor:
    """Counts the routing of the examples it is given."""

    def __init__(self, model: ModelConfig, config: CaptureConfig, parts_url: str) -> None:
        self.holder = ModelHolder(model, config.num_actors)
        self.parts = Folder.open(parts_url)
        self.stack = ExitStack()
        self.counter = self.stack.enter_context(counting(self.holder.model, weights=config.weights))

    def __call__(self, batch: dict[str, np.ndarray[Any, Any]]) -> dict[str, np.ndarray[Any, Any]]:
        """Counts one block of examples and writes its part; returns what was done."""
        tokenizer = self.holder.tokenizer
        rows = [
            TokenizedRow(
                encode_prompt(tokenizer, json.loads(messages)),
                encode_answer(tokenizer, response) if isinstance(response, str) and response else [],
            )
            for messages, response in zip(batch["messages"], batch["response"], strict=True)
        ]
        counts, num_tokens = count_rows(self.holder.model, self.counter, rows, pad_id=pad_token_id(tokenizer))
        part = counts_from_forward(
            counts,
            num_tokens,
            batch_idx=batch["batch_idx"],
            in_batch_idx=batch["in_batch_idx"],
            label=list(batch["label"]),
            category=list(batch["category"]),
            pair=[pair if isinstance(pair, str) else "" for pair in batch["pair"]],
            weights=self.counter.last_weights,
            moe_layers=self.counter.moe_layers,
        )
        part.check()
        name = content_hash([batch["batch_idx"].tolist(), batch["in_batch_idx"].tolist()])
        self.parts.write_table(f"part-{name}.parquet", counts_to_table(part))
        return {"num_tokens": num_tokens.sum(axis=1), "batch_idx": batch["batch_idx"]}


def capture(examples: pd.DataFrame, model: ModelConfig, config: CaptureConfig, parts: Folder) -> int:
    """Counts the routing of every example that has no counts in `parts` yet.

    Args:
        examples: the stored batches, one row per example.
        model: which model.
        config: actors and sizes.
        parts: folder of Parquet parts; may hold those of an unfinished capture.

    Returns:
        tokens counted now.
    """
    todo = _not_captured(examples, parts)
    if todo.empty:
        return 0
    require_cpus(config.num_actors + 1, "capture")
    columns = ["batch_idx", "in_batch_idx", "label", "category", "messages", "response", "pair"]
    texts = {name: "string" for name in ("response", "pair")}
    table = pa.Table.from_pandas(todo[columns].astype(texts), preserve_index=False)
    size = config.rows_per_forward
    blocks = [table.slice(start, size) for start in range(0, len(table), size)]
    results = ray.data.from_arrow(blocks).map_batches(
        CaptureActor,
        fn_constructor_args=(model, config, parts.url),
        compute=ray.data.ActorPoolStrategy(size=config.num_actors),
        batch_size=size,
        batch_format="numpy",
        num_gpus=config.gpus_per_actor or None,
    )
    num_tokens = 0
    with progress("routing capture", len(todo)) as meter:
        for done in results.iter_batches(batch_size=None, batch_format="numpy"):
            num_tokens += int(done["num_tokens"].sum())
            meter.advance(len(done["num_tokens"]))
    return num_tokens


def read_counts(parts: Folder) -> RoutingCounts:
    """All counts of a finished capture, ordered by batch and place."""
    names = [name for name in parts.names() if name.endswith(".parquet") and not name.startswith(".")]
    return concat_counts([table_to_counts(parts.read_table(name)) for name in names])


def _not_captured(examples: pd.DataFrame, parts: Folder) -> pd.DataFrame:
    names = [name for name in parts.names() if name.endswith(".parquet") and not name.startswith(".")]
    if not names:
        return examples
    done = pd.concat([parts.read_table(name).select(["batch_idx", "in_batch_idx"]).to_pandas() for name in names])
    keys = ["batch_idx", "in_batch_idx"]
    return examples[~pd.MultiIndex.from_frame(examples[keys]).isin(pd.MultiIndex.from_frame(done[keys]))]
