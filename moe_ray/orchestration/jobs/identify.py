"""Distributed identification: stored counts, grouped by `batch_idx`, to a risk table in parts, masks and certainty.

Ray Data reads the parts of the capture, groups their rows by batch and makes the risk table of each batch; a sink writes
those that come to a process as parts, and returns which experts are unsafe and how certain that is. No process sees more of
the table than the batches of a part. A part is written whole or not at all, so an identification that was killed goes on
with the batches that no part holds yet.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
import ray.data
from ray.data.block import BlockAccessor
from ray.data.context import ShuffleStrategy

from moe_ray.config.identify import IdentifyConfig
from moe_ray.identification.findings import Findings, findings_of, joined
from moe_ray.identification.identify import identify as identify_counts
from moe_ray.identification.risk import batches_with_both_labels
from moe_ray.identification.risk_tables import part_name, write_part
from moe_ray.orchestration.cluster.ray_session import all_cpus, arrow_filesystem, require_cpus
from moe_ray.routing.count_store import PartsInfo, parts_info
from moe_ray.routing.count_tables import table_to_counts
from moe_ray.run_directory import RISK, RunDirectory
from moe_ray.storage.folder import Folder

_EXPERTS_PER_PART, _MAX_BATCHES_PER_PART = 200_000, 64
"""Of the risk table: what a process holds of it, and what a killed identification does again."""

_ROWS_PER_BLOCK, _BYTES_PER_BLOCK, _BLOCKS_PER_CPU = 1024, 128 * 2**20, 4
"""Blocks of counts are worth a process. A shuffle has the square of their number in pieces: many rows make larger ones."""

_LABELS = ("safe", "unsafe")


class _Found(NamedTuple):
    """What a process says of its batches.

    Attributes:
        findings: of each part that it wrote.
        tokens: `batch_idx, safe, unsafe`: tokens of each label, of every batch.
    """

    findings: list[pa.Table]
    tokens: list[pa.Table]


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
    done = _parts_done(risk)
    sink = RiskSink(risk, config, seed, starts=[int(batches[0]) for batches in done.values()])
    _grouped(run.counts_folder, info, done, config, seed).write_datasink(sink)
    findings = list(sink.found.findings)
    if done:
        again = ray.data.from_items([{"part": name} for name in done]).map_batches(
            _findings_of_parts,
            batch_size=1,
            batch_format="pyarrow",
            fn_kwargs={"risk": risk.url, "config": config, "seed": seed},
        )
        findings += again.iter_batches(batch_size=None, batch_format="pyarrow")
    _require_both_labels(sink.found.tokens, done, config)
    return joined(findings, config, layers=info.layers, num_experts=info.num_experts)


def _grouped(
    counts: Folder, info: PartsInfo, done: dict[str, npt.NDArray[np.int64]], config: IdentifyConfig, seed: int
) -> ray.data.Dataset:
    """A row per batch that no part of the risk table holds yet; see `_identify_batch`."""
    # The newer ways to shuffle start processes of their own for each side of it, and take twice as long for small runs.
    ray.data.DataContext.get_current().shuffle_strategy = ShuffleStrategy.SORT_SHUFFLE_PULL_BASED
    names, num_rows = counts.parquet_names(), 0
    for name in names:
        with counts.open_parquet(name) as file:
            num_rows += file.metadata.num_rows
            columns = [column for column in file.schema_arrow.names if column != "ids"]
    num_experts = len(info.layers) * info.num_experts
    rows = ray.data.read_parquet(
        [counts.file(name) for name in names],
        filesystem=arrow_filesystem(counts),
        columns=columns,
        partitioning=None,
        override_num_blocks=num_blocks(num_rows, num_experts, cpus=all_cpus()),
    )
    if done:
        rows = rows.map_batches(
            _without,
            batch_size=None,
            batch_format="pyarrow",
            fn_kwargs={"batch_idx": np.concatenate(list(done.values()))},
        )
    return rows.groupby("batch_idx").map_groups(
        _identify_batch, batch_format="pyarrow", fn_kwargs={"config": config, "seed": seed}
    )


def num_blocks(num_rows: int, num_experts: int, *, cpus: float) -> int:
    """In how many blocks counts are read and grouped.

    Args:
        num_rows: of the counts.
        num_experts: of all layers, in each row.
        cpus: of the cluster.
    """
    worth_a_process = -(-num_rows // _ROWS_PER_BLOCK)
    of_memory = -(-num_rows * num_experts * 4 // _BYTES_PER_BLOCK)
    return max(1, min(worth_a_process, max(int(cpus) * _BLOCKS_PER_CPU, of_memory)))


def _without(rows: pa.Table, batch_idx: npt.NDArray[np.int64]) -> pa.Table:
    """The rows of all batches but these."""
    return rows.filter(pc.invert(pc.is_in(rows["batch_idx"], pa.array(batch_idx))))


def _identify_batch(rows: pa.Table, config: IdentifyConfig, seed: int) -> pa.Table:
    """One row: the batch, its tokens of both labels, and its risk table in Arrow's form, none where a label has no token."""
    counts = table_to_counts(rows)
    is_of_role = np.isin(counts.role.astype(str), list(config.roles))
    tokens = [int(counts.num_tokens[is_of_role & (counts.label == label)].sum()) for label in _LABELS]
    risk = None
    if all(tokens):
        table = pa.Table.from_pandas(identify_counts(counts, config, seed=seed), preserve_index=False)
        stream = pa.BufferOutputStream()
        with pa.ipc.new_stream(stream, table.schema) as writer:
            writer.write_table(table)
        risk = stream.getvalue().to_pybytes()
    columns = {"batch_idx": counts.batch_idx[:1], **{label: [n] for label, n in zip(_LABELS, tokens, strict=True)}}
    return pa.table({**columns, "risk": pa.array([risk], type=pa.large_binary())})


class RiskSink(ray.data.Datasink[_Found]):  # type: ignore[misc]
    """Writes the rows of `_identify_batch` as parts of a risk table, and keeps what they say of each batch.

    Args:
        risk: the folder of the parts.
        config: that the tables were made with.
        seed: the same.
        starts: the first batch of every part that is there already; no new one reaches from below one to above it, so that
            parts stay in order.

    Attributes:
        found: of all processes, when the data set is written.
    """

    def __init__(self, risk: Folder, config: IdentifyConfig, seed: int, starts: Sequence[int]) -> None:
        self._risk, self._config, self._seed, self._starts = risk.url, config, seed, sorted(starts)
        self.found = _Found([], [])

    def write(self, blocks: Iterable[Any], ctx: Any) -> _Found:
        """Writes one process's batches."""
        risk, found = Folder.open(self._risk), _Found([], [])
        for table in self._tables(blocks, found):
            write_part(risk, table)
            found.findings.append(findings_of(table, self._config, seed=self._seed))
        return found

    def _tables(self, blocks: Iterable[Any], found: _Found) -> Iterator[pd.DataFrame]:
        """The risk tables of as many batches as make a part, ascending."""
        held, size, place = list[pd.DataFrame](), 0, -1
        for block in blocks:
            rows = BlockAccessor.for_block(block).to_arrow()
            if not rows.num_rows:
                continue
            found.tokens.append(rows.drop_columns(["risk"]))
            for batch_idx, stream in zip(rows["batch_idx"].to_pylist(), rows["risk"], strict=True):
                if not stream.is_valid:
                    continue
                table = pa.ipc.open_stream(stream.as_buffer()).read_all().to_pandas()
                here = int(np.searchsorted(self._starts, batch_idx))
                if held and (here != place or len(held) >= size):
                    yield pd.concat(held, ignore_index=True)
                    held = []
                held.append(table)
                place, size = here, min(max(1, _EXPERTS_PER_PART // len(table)), _MAX_BATCHES_PER_PART)
        if held:
            yield pd.concat(held, ignore_index=True)

    def on_write_complete(self, write_result: ray.data.datasource.WriteResult[_Found]) -> None:
        """Takes what the processes returned."""
        for found in write_result.write_returns:
            self.found.findings.extend(found.findings)
            self.found.tokens.extend(found.tokens)


def _parts_done(risk: Folder) -> dict[str, npt.NDArray[np.int64]]:
    """Names of the parts that an unfinished identification left, and their batches; one that holds another's batch goes.

    Parts of two identifications hold the same batch where a process of the first wrote on after its driver had died.
    """
    done, known = dict[str, npt.NDArray[np.int64]](), set[int]()
    for name in risk.parquet_names():
        with risk.open_parquet(name) as file:
            batches = np.unique(file.read(columns=["batch_idx"])["batch_idx"].to_numpy())
        if known.isdisjoint(batches.tolist()) and name == part_name(batches):
            done[name] = batches
            known.update(batches.tolist())
        else:
            risk.remove(name)
    return done


def _findings_of_parts(rows: pa.Table, risk: str, config: IdentifyConfig, seed: int) -> pa.Table:
    """What parts of an earlier identification say of each batch."""
    parts = Folder.open(risk)
    return pa.concat_tables(
        [findings_of(parts.read_frame(name), config, seed=seed) for name in rows["part"].to_pylist()]
    )


def _require_both_labels(
    tokens: Sequence[pa.Table], done: dict[str, npt.NDArray[np.int64]], config: IdentifyConfig
) -> None:
    """Names the batches that have tokens of one label only.

    Raises:
        InputError: all are of that kind.
    """
    known = [table.to_pandas() for table in tokens]
    known += [pd.DataFrame({"batch_idx": batches}).assign(safe=1, unsafe=1) for batches in done.values()]
    batches_with_both_labels(pd.concat(known, ignore_index=True), config.roles)
