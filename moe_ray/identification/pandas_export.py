"""Export for pandas users: one pickled dictionary that `pd.read_pickle` opens without moe-ray.

It is written for others and never read back: moe-ray's own artifacts are Parquet, npz and JSON. Only plain Python, numpy
and pandas values are in it.
"""

from __future__ import annotations

import json
import pickle
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt
import pandas as pd

from moe_ray.chat_messages import prompt_text
from moe_ray.config.identify import IdentifyConfig
from moe_ray.errors import InputError
from moe_ray.experts import Expert, ExpertMasks
from moe_ray.identification.risk_tables import Risk, aggregate_risk
from moe_ray.identification.selection import bar_of, difference_column, top_experts

_PROTOCOL = 4  # what Python 3.8 and later read


def export_name(model_name: str) -> str:
    """The usual file name: `sft_dataset_<model>.pkl`, from the last part of the model's path or hub name."""
    last = model_name.rstrip("/").rpartition("/")[2] or "model"
    return f"sft_dataset_{re.sub(r'[^A-Za-z0-9._-]+', '_', last)}.pkl"


def export_bytes(masks: ExpertMasks) -> int:
    """Size of the masks in the pickle, which are most of it in a large run."""
    return masks.masks_BLE.size * np.dtype(np.float32).itemsize


def export_data(
    *,
    masks: ExpertMasks,
    risk: Risk,
    batches: pd.DataFrame,
    model_name: str,
    num_experts_per_tok: int,
    num_layers: int | None = None,
    selection: IdentifyConfig | None = None,
) -> dict[str, Any]:
    """The dictionary that `export_pickle` writes.

    Lists have one entry per batch of `masks`, in its order; entry i of every list is the same batch.

    Args:
        masks: the selection.
        risk: the risk table it was made of.
        batches: one row per example, as stored: `batch_idx, in_batch_idx, label, category, messages` (JSON text), ….
        model_name: of the analysed model.
        num_experts_per_tok: the router's k.
        num_layers: decoder layers of the model, dense ones included; None = up to the last MoE layer.
        selection: the settings, for the global experts; None = the defaults.

    Returns:
        `batch_unsafe_experts`: lists of `(layer, expert)`, the largest risk difference first, layer = decoder layer
        index; `batch_expert_masks`: float32 arrays (num_layers, n_experts), 1 = unsafe, so `mask[layer, expert]` works and
        dense layers are rows of zeros; `aggregated_risk_diff`: DataFrame of `aggregate_risk`; `global_unsafe_experts`: those
        whose mean over batches, in `difference_column`, is above the rule's bar, the `top_k` largest first;
        `batch_data_list`: lists of a batch's examples as dictionaries, with messages as lists and `prompt`, their text;
        `num_layers`, `n_experts`, `num_experts_per_tok`, `model_name`, `batch_size` (examples of the largest batch),
        `safe_ratio` (share of safe ones).

    Raises:
        InputError: a batch has no examples, or `num_layers` does not reach the last MoE layer.
    """
    depth = max(masks.layers) + 1 if num_layers is None else num_layers
    if depth <= max(masks.layers):
        raise InputError(f"num_layers: got {depth}, expected more than the last MoE layer's index {max(masks.layers)}")
    aggregated, chosen = aggregate_risk(risk), selection or IdentifyConfig()
    column = difference_column(chosen)
    bar = bar_of(aggregated[column], chosen)
    data = _examples_of_batches(batches, masks.batch_idx)
    examples = [example for batch in data for example in batch]
    return {
        "batch_unsafe_experts": [_as_tuples(masks.selected[batch]) for batch in masks.batch_idx],
        "batch_expert_masks": _full_depth(masks, depth),
        "aggregated_risk_diff": aggregated,
        "global_unsafe_experts": _as_tuples(top_experts(aggregated, threshold=bar, top_k=chosen.top_k, column=column)),
        "batch_data_list": data,
        "num_layers": depth,
        "n_experts": int(masks.masks_BLE.shape[2]),
        "num_experts_per_tok": int(num_experts_per_tok),
        "model_name": model_name,
        "batch_size": max(map(len, data)),
        "safe_ratio": sum(example["label"] == "safe" for example in examples) / len(examples),
    }


def export_pickle(target: str | Path | BinaryIO, **contents: Any) -> None:
    """Writes `export_data(**contents)` as a pickle to a path or an open binary file (any fsspec file will do)."""
    data = pickle.dumps(export_data(**contents), protocol=_PROTOCOL)
    if isinstance(target, (str, Path)):
        Path(target).write_bytes(data)
    else:
        target.write(data)


def _as_tuples(experts: Iterable[Expert]) -> list[tuple[int, int]]:
    return [(int(expert.layer), int(expert.expert)) for expert in experts]


def _full_depth(masks: ExpertMasks, num_layers: int) -> list[npt.NDArray[np.float32]]:
    full = np.zeros((len(masks.batch_idx), num_layers, masks.masks_BLE.shape[2]), dtype=np.float32)
    full[:, list(masks.layers)] = masks.masks_BLE
    return [mask.copy() for mask in full]


def _examples_of_batches(batches: pd.DataFrame, batch_idx: Iterable[int]) -> list[list[dict[str, Any]]]:
    groups = dict(iter(batches.sort_values("in_batch_idx").groupby("batch_idx")))
    missing = [batch for batch in batch_idx if batch not in groups]
    if missing:
        raise InputError(f"batches {missing[:20]} have masks but no examples; give the batches table of the same run")
    return [[_plain(row) for row in groups[batch].to_dict("records")] for batch in batch_idx]


def _plain(row: dict[Any, Any]) -> dict[str, Any]:
    """A stored row with its messages as a list, their text as `prompt`, and missing values as None."""
    values = {
        str(name): None if pd.api.types.is_scalar(value) and pd.isna(value) else value for name, value in row.items()
    }
    messages = values.get("messages")
    if isinstance(messages, str):
        parsed = json.loads(messages)
        values |= {"messages": parsed, "prompt": prompt_text(parsed)}
    return values
