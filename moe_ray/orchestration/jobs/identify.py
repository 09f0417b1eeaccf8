"""Distributed identification: stored counts, grouped by `batch_idx`, to one risk table.

A capture writes a batch's examples into few parts, so grouping needs no shuffle: each task gets some batches and the names
of the parts that hold them. No process but the one that joins the risk tables sees more than its own batches.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import ray.data

from moe_ray.config.identify import IdentifyConfig
from moe_ray.identification.identify import identify as identify_counts
from moe_ray.identification.risk import batches_with_both_labels
from moe_ray.orchestration.cluster.ray_session import require_cpus
from moe_ray.routing.count_store import batches_in_parts, parts_info, read_batches
from moe_ray.run_directory import RunDirectory
from moe_ray.storage.folder import Folder

_EXPERTS_PER_TASK, _MAX_BATCHES_PER_TASK = 200_000, 64
"""Work of a task: many times what its process takes to start, little enough to be spread and held."""


def identify(run: RunDirectory, config: IdentifyConfig, *, seed: int) -> pd.DataFrame:
    """The risk table of every batch that has tokens of both labels, from the run's stored counts.

    Raises:
        InputError: no batch has.
    """
    require_cpus(2, "identification")
    parts = run.counts_folder
    info, where = parts_info(parts), batches_in_parts(parts, config.roles)
    batches = batches_with_both_labels(where, config.roles)
    where = where[where["batch_idx"].isin(batches)]
    tasks = [
        pa.table({"batch_idx": [group], "parts": [sorted(set(where.loc[where["batch_idx"].isin(group), "part"]))]})
        for group in _groups(batches, len(info.layers) * info.num_experts)
    ]
    tables = ray.data.from_arrow(tasks).map_batches(
        _risk_of_group,
        batch_size=None,
        batch_format="numpy",
        fn_kwargs={"parts": parts.url, "config": config, "seed": seed},
    )
    blocks = [pd.DataFrame(block) for block in tables.iter_batches(batch_size=None, batch_format="numpy")]
    risk = pd.concat(blocks, ignore_index=True)
    return risk.sort_values(["batch_idx", "layer", "expert"], ignore_index=True)


def _groups(batches: Sequence[int], num_experts: int) -> list[list[int]]:
    """Batches of one task each; `num_experts` is that of all layers."""
    size = min(max(1, _EXPERTS_PER_TASK // num_experts), _MAX_BATCHES_PER_TASK)
    return [list(batches[start : start + size]) for start in range(0, len(batches), size)]


def _risk_of_group(
    task: dict[str, np.ndarray[Any, Any]], parts: str, config: IdentifyConfig, seed: int
) -> dict[str, np.ndarray[Any, Any]]:
    groups = zip(task["parts"], task["batch_idx"], strict=True)
    tables = [
        identify_counts(read_batches(Folder.open(parts), list(names), [int(i) for i in batches]), config, seed=seed)
        for names, batches in groups
    ]
    risk = pd.concat(tables, ignore_index=True)
    return {name: risk[name].to_numpy() for name in risk.columns}
