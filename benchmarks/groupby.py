"""What grouping counts by batch with Ray Data costs beside handing each task the parts that hold its batches.

python benchmarks/groupby.py                     256 batches, then 100,000
python benchmarks/groupby.py --batches 256       of these sizes only
python benchmarks/groupby.py --runs 1            each way once, where starting Ray's processes is nothing beside the work

`by parts` reads no more than it needs, since a capture writes a batch's examples into few parts, but plans in the driver
what each task reads. `groupby` is `read_parquet(parts).groupby("batch_idx").map_groups(…)`, as identification is done; it
sorts all rows through Ray's object store, which goes to disk where memory ends. Both write the risk table in parts and give
the masks, which are compared bit by bit. Counts are those of a model of 16 layers of 64 experts, 8 + 8 prompts a batch,
without relabellings, so that what is seen is what it costs to move the rows. Wall seconds; Ray's processes
are warm in the second run of a way, and the first of all, `by parts`, pays for most of their start.
"""

from __future__ import annotations

import argparse
import os
import resource
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pandas as pd
import pyarrow as pa
import ray.data

from moe_ray.config.cluster import ClusterConfig
from moe_ray.config.identify import IdentifyConfig
from moe_ray.experts import Expert
from moe_ray.identification.findings import Findings, findings_of, joined
from moe_ray.identification.identify import identify as identify_counts
from moe_ray.identification.risk_tables import part_name, write_part
from moe_ray.orchestration.cluster.ray_session import ray_session
from moe_ray.orchestration.jobs.identify import identify
from moe_ray.routing.count_store import batches_in_parts, parts_info, plan_reads, read_batches
from moe_ray.routing.count_tables import counts_to_table
from moe_ray.routing.counts import concat_counts
from moe_ray.run_directory import COUNTS, RISK, RunDirectory
from moe_ray.storage.folder import Folder
from moe_ray.testing.simulated_counts import Population, simulate

OLMOE = Population(num_layers=16, num_experts=64, num_experts_per_tok=8)
CONFIG = IdentifyConfig(roles=("prompt",), weighting="tokens", permutations=0, resamples=0)
_BATCHES_PER_TASK, _BATCHES_PER_PART = 64, 64


def write_counts(run: RunDirectory, num_batches: int) -> None:
    """Parts as a capture leaves them; a few simulated batches, whose experts are renumbered at random to make many."""
    rng = np.random.default_rng(0)
    models = [simulate(OLMOE, seed=seed, planted=(Expert(1, 3),), shift=0.3) for seed in range(4)]
    for start in range(0, num_batches, _BATCHES_PER_PART):
        batches = [
            replace(
                models[batch % len(models)],
                batch_idx=np.full(16, batch),
                counts_NLE=models[batch % len(models)].counts_NLE[:, :, rng.permutation(OLMOE.num_experts)],
            )
            for batch in range(start, min(start + _BATCHES_PER_PART, num_batches))
        ]
        run.counts_folder.write_table(f"part-{start:09d}.parquet", counts_to_table(concat_counts(batches)))


def by_parts(run: RunDirectory, folder: Folder) -> Findings:
    """The driver finds out which parts hold which batches, and a task reads its own."""
    info, where = parts_info(run.counts_folder), batches_in_parts(run.counts_folder, CONFIG.roles)
    tasks = [
        pa.table({"batch_idx": [group], "parts": [names]})
        for group, names in plan_reads(where, batches_at_once=_BATCHES_PER_TASK)
    ]
    found = ray.data.from_arrow(tasks).map_batches(
        _identify_task,
        batch_size=None,
        batch_format="pyarrow",
        fn_kwargs={"counts": run.counts_folder.url, "risk": folder.sub(RISK).url},
    )
    tables = found.iter_batches(batch_size=None, batch_format="pyarrow")
    return joined(tables, CONFIG, layers=info.layers, num_experts=info.num_experts)


def _identify_task(tasks: pa.Table, counts: str, risk: str) -> pa.Table:
    parts, found = Folder.open(risk), []
    for task in tasks.to_pylist():
        rows = read_batches(Folder.open(counts), task["parts"], task["batch_idx"])
        table = identify_counts(rows, CONFIG)
        if not parts.exists(part_name(task["batch_idx"])):
            write_part(parts, table)
        found.append(findings_of(table, CONFIG, seed=0))
    return pa.concat_tables(found)


def by_group(run: RunDirectory, folder: Folder) -> Findings:
    """As the stage does it."""
    return identify(run, folder, CONFIG, seed=0)


WAYS: dict[str, Callable[[RunDirectory, Folder], Findings]] = {"by parts": by_parts, "groupby": by_group}
COLUMNS = ["batches", "counts", "way", "run", "seconds", "driver's peak so far, GB", "load"]


def compare(num_batches: int, scratch: str, runs: int = 2) -> pd.DataFrame:
    """A row per way and run: seconds, counts' size, the driver's memory, the machine's load; both must find the same."""
    rows, digests, certainty = [], set(), []
    with tempfile.TemporaryDirectory(dir=scratch) as work:
        run = RunDirectory.open(work)
        write_counts(run, num_batches)
        size = sum(os.path.getsize(run.sub(COUNTS).file(name)) for name in run.counts_folder.parquet_names())
        for way, work_on in WAYS.items():
            for number in range(1, runs + 1):
                folder = run.sub(f"{way}-{number}")
                began = time.perf_counter()
                found = work_on(run, folder)
                seconds = time.perf_counter() - began
                digests.add(found.masks.digest())
                certainty.append(found.certainty)
                peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
                rows.append((num_batches, f"{size / 1e6:.0f} MB", way, number, seconds, peak, os.getloadavg()[0]))
                print(_text(pd.DataFrame(rows[-1:], columns=COLUMNS)), flush=True, file=sys.stderr)
                shutil.rmtree(folder.path)
    assert len(digests) == 1, "the masks differ"
    for other in certainty[1:]:
        pd.testing.assert_frame_equal(certainty[0], other)
    return pd.DataFrame(rows, columns=COLUMNS)


def _text(table: pd.DataFrame) -> str:
    return table.to_string(index=False, float_format="{:.2f}".format)


def main() -> int:
    """Prints a table for each size."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batches", type=int, nargs="+", default=[256, 100_000])
    parser.add_argument("--runs", type=int, default=2, help="how often each way is run")
    parser.add_argument("--scratch", default=tempfile.gettempdir(), help="needs 8 GB for 100,000 batches")
    arguments = parser.parse_args()
    with ray_session(ClusterConfig()):
        ray.data.range(64).map_batches(lambda rows: rows).take_all()
        for num_batches in arguments.batches:
            print(_text(compare(num_batches, arguments.scratch, arguments.runs)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
