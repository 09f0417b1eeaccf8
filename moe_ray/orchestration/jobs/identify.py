"""Distributed identification: stored counts, grouped by `batch_idx`, to a risk table in parts, masks and certainty.

A capture writes a batch's examples into few parts, so grouping needs no shuffle: each task gets some batches and the names
of the parts that hold them, writes its rows of the risk table as a part, and returns which experts are unsafe and how
certain that is. No process sees more of the table than a task's batches. A part is written whole or not at all, so an
identification that was killed goes on with the parts that are there.
"""

from __future__ import annotations

from collections.abc import Sequence

import pandas as pd
import pyarrow as pa
import ray.data

from moe_ray.config.identify import IdentifyConfig
from moe_ray.identification.findings import Findings, findings_of, joined
from moe_ray.identification.identify import identify as identify_counts
from moe_ray.identification.risk import batches_with_both_labels
from moe_ray.identification.risk_tables import part_name, write_part
from moe_ray.orchestration.cluster.ray_session import require_cpus
from moe_ray.routing.count_store import batches_in_parts, parts_info, plan_reads, read_batches
from moe_ray.run_directory import RISK, RunDirectory
from moe_ray.storage.folder import Folder

_EXPERTS_PER_TASK, _MAX_BATCHES_PER_TASK = 200_000, 64
"""Work of a task: many times what its process takes to start, little enough to be spread and held."""


def identify(run: RunDirectory, folder: Folder, config: IdentifyConfig, *, seed: int) -> Findings:
    """Masks and certainty of every batch that has tokens of both labels, from the run's stored counts.

    Args:
        run: its counts are read.
        folder: gets `risk_differences.parquet`, a folder of parts; it may hold those of an unfinished identification with
            the same configuration, which are kept.
        config: of identification.
        seed: of drawn relabellings and resamples, and of rule `random`.

    Raises:
        InputError: no batch has tokens of both labels, or none has an unsafe expert.
    """
    require_cpus(2, "identification")
    info, risk = parts_info(run.counts_folder), folder.sub(RISK)
    where = batches_in_parts(run.counts_folder, config.roles)
    batches = batches_with_both_labels(where, config.roles)
    tasks = _plan(where, batches, len(info.layers) * info.num_experts)
    wanted = {part_name(task["batch_idx"][0].as_py()) for task in tasks}
    for name in set(risk.parquet_names()) - wanted:
        risk.remove(name)
    found = ray.data.from_arrow(tasks).map_batches(
        _identify_groups,
        batch_size=None,
        batch_format="pyarrow",
        fn_kwargs={"counts": run.counts_folder.url, "risk": risk.url, "config": config, "seed": seed},
    )
    tables = found.iter_batches(batch_size=None, batch_format="pyarrow")
    return joined(tables, config, layers=info.layers, num_experts=info.num_experts)


def _plan(where: pd.DataFrame, batches: Sequence[int], num_experts: int) -> list[pa.Table]:
    """A row per task: its batches, and the names of the parts that hold them.

    Args:
        where: `batch_idx, part`, in any order.
        batches: to identify.
        num_experts: of all layers.
    """
    size = min(max(1, _EXPERTS_PER_TASK // num_experts), _MAX_BATCHES_PER_TASK)
    chosen = where[where["batch_idx"].isin(batches)]
    return [
        pa.table({"batch_idx": [group], "parts": [names]}) for group, names in plan_reads(chosen, batches_at_once=size)
    ]


def _identify_groups(tasks: pa.Table, counts: str, risk: str, config: IdentifyConfig, seed: int) -> pa.Table:
    """Writes the risk tables of tasks that have none yet; returns what they say of each batch."""
    parts, found = Folder.open(risk), []
    for task in tasks.to_pylist():
        name = part_name(task["batch_idx"])
        if parts.exists(name):
            table = parts.read_frame(name)
        else:
            table = identify_counts(
                read_batches(Folder.open(counts), task["parts"], task["batch_idx"]), config, seed=seed
            )
            write_part(parts, table)
        found.append(findings_of(table, config, seed=seed))
    return pa.concat_tables(found)
