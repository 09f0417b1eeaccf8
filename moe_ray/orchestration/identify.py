"""Distributed identification: stored counts, grouped by `batch_idx`, to one risk table."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
import ray
import ray.data

from moe_ray.artifacts import Folder, table_to_counts
from moe_ray.config import SelectionConfig
from moe_ray.identification import identify_batch
from moe_ray.orchestration.cluster import require_cpus
from moe_ray.routing import RoutingCounts


def identify(parts: Folder, config: SelectionConfig, *, seed: int) -> pd.DataFrame:
    """The risk table of every batch, from the counts in `parts`; each group sees one whole batch only."""
    require_cpus(2, "identification")
    names = [name for name in parts.names() if name.endswith(".parquet") and not name.startswith(".")]
    first = table_to_counts(parts.read_table(names[0]))
    counts = ray.data.read_parquet([f"{parts.url}/{name}" for name in names])
    tables = counts.groupby("batch_idx").map_groups(
        _risk_of_group,
        batch_format="numpy",
        fn_kwargs={
            "layers": first.layers,
            "num_experts_per_tok": first.num_experts_per_tok,
            "config": config,
            "seed": seed,
        },
    )
    blocks = [pd.DataFrame(block) for block in tables.iter_batches(batch_size=None, batch_format="numpy")]
    risk = pd.concat(blocks, ignore_index=True)
    return risk.sort_values(["batch_idx", "layer", "expert"], ignore_index=True)


def _risk_of_group(
    group: dict[str, np.ndarray[Any, Any]],
    layers: tuple[int, ...],
    num_experts_per_tok: int,
    config: SelectionConfig,
    seed: int,
) -> dict[str, np.ndarray[Any, Any]]:
    names = ("batch_idx", "in_batch_idx", "label", "category", "role", "num_tokens", "pair")
    counts = RoutingCounts(
        **{name: group[name] for name in names},
        counts_NLE=group["counts"],
        weights_NLE=group.get("weights"),
        layers=layers,
        num_experts_per_tok=num_experts_per_tok,
    )
    risk = identify_batch(counts, config, seed=seed)
    return {name: risk[name].to_numpy() for name in risk.columns}
