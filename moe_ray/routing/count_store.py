"""The parts of a capture: Parquet files of counts, each written whole, that together hold every example once.

What is done is read from the parts' key columns alone, a part at a time, so neither resuming nor planning loads counts.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc

from moe_ray.errors import InputError
from moe_ray.routing.count_tables import counts_to_table, table_to_counts
from moe_ray.routing.counts import RoutingCounts, concat_counts
from moe_ray.storage.fingerprint import content_hash
from moe_ray.storage.folder import Folder

_KEYS = ["batch_idx", "in_batch_idx"]
_PLACES_PER_BATCH = 1 << 20


class PartsInfo(NamedTuple):
    """What all parts have in common."""

    layers: tuple[int, ...]
    num_experts: int
    num_experts_per_tok: int


def keys_of(batch_idx: npt.ArrayLike, in_batch_idx: npt.ArrayLike) -> npt.NDArray[np.int64]:
    """One number per example."""
    return np.asarray(batch_idx, dtype=np.int64) * _PLACES_PER_BATCH + np.asarray(in_batch_idx, dtype=np.int64)


def read_keys(folder: Folder, name: str) -> npt.NDArray[np.int64]:
    """`keys_of` the rows of a Parquet file; nothing else of it is read."""
    with folder.open_parquet(name) as file:
        chunks = [_table_keys(pa.Table.from_batches([batch])) for batch in file.iter_batches(columns=_KEYS)]
    return np.concatenate(chunks) if chunks else np.empty(0, dtype=np.int64)


def _table_keys(table: pa.Table) -> npt.NDArray[np.int64]:
    return keys_of(*(table.column(name).to_numpy() for name in _KEYS))


def rows_without(keys: npt.NDArray[np.int64], folder: Folder, names: Sequence[str]) -> npt.NDArray[np.int64]:
    """Positions in `keys` of examples that are in none of the files."""
    order = np.argsort(keys, kind="stable")
    is_todo = np.ones(len(keys), dtype=bool)
    for name in names:
        done = read_keys(folder, name)
        found = order[np.minimum(np.searchsorted(keys, done, sorter=order), len(keys) - 1)]
        is_todo[found[keys[found] == done]] = False
    return np.flatnonzero(is_todo)


def plan_windows(batch_idx: npt.NDArray[np.int64], *, max_rows: int) -> list[npt.NDArray[np.int64]]:
    """Positions cut into windows of at most `max_rows`, between batches; a larger batch is a window of its own.

    Args:
        batch_idx: of each example, in the order in which they are stored.
        max_rows: examples of a window.
    """
    if not len(batch_idx):
        return []
    starts = np.flatnonzero(np.diff(batch_idx, prepend=batch_idx[:1] - 1))
    cuts = [0]
    for start, end in zip(starts, [*starts[1:], len(batch_idx)], strict=True):
        if end - cuts[-1] > max_rows and start > cuts[-1]:
            cuts.append(int(start))
    return np.split(np.arange(len(batch_idx)), cuts[1:])


def remove_doubles(parts: Folder) -> int:
    """Removes rows that an earlier part holds too; returns how many.

    Such rows are left by a worker of an earlier run that was still writing.

    Holds 8 bytes per example.
    """
    seen = np.empty(0, dtype=np.int64)
    removed = 0
    for name in parts.parquet_names():
        keys = read_keys(parts, name)
        doubled = np.isin(keys, seen)
        if doubled.any():
            removed += int(doubled.sum())
            if doubled.all():
                parts.remove(name)
            else:
                kept = parts.read_table(name).filter(pa.array(~doubled))
                # Through the counts, since a part's digest is of the rows that it holds.
                parts.write_table(name, counts_to_table(table_to_counts(kept)))
        seen = np.union1d(seen, keys)
    return removed


def parts_info(parts: Folder) -> PartsInfo:
    """What all parts have in common, from the first one.

    Raises:
        InputError: there is none.
    """
    names = parts.parquet_names()
    if not names:
        raise InputError("no routing counts; capture at least one batch")
    with parts.open_parquet(names[0]) as file:
        schema = file.schema_arrow
        about = json.loads(schema.metadata[b"moe_ray"])
        num_experts = schema.field("counts").type.shape[1]
    return PartsInfo(tuple(about["layers"]), num_experts, int(about["num_experts_per_tok"]))


def digest_of_parts(parts: Folder) -> str:
    """A hash of all stored counts, the same however they are cut into parts; reads no counts."""
    total, about = 0, dict[str, Any]()
    for name in parts.parquet_names():
        with parts.open_parquet(name) as file:
            about = json.loads(file.schema_arrow.metadata[b"moe_ray"])
        total = (total + int(about.pop("digest"), 16)) % (1 << 64)
    return content_hash([about, total])


def read_counts(parts: Folder) -> RoutingCounts:
    """All counts of a finished capture, without raw ids, ordered by batch and position in it.

    Of a large capture, read some at a time with `read_batches`.
    """
    return concat_counts([table_to_counts(_without_ids(parts, name)) for name in parts.parquet_names()])


def read_batches(parts: Folder, names: Sequence[str], batch_idx: Sequence[int]) -> RoutingCounts:
    """The counts of some batches, from the parts that hold them."""
    chosen = []
    for name in names:
        table = _without_ids(parts, name)
        wanted = table.filter(pc.is_in(table["batch_idx"], pa.array(batch_idx)))
        if wanted.num_rows:
            chosen.append(table_to_counts(wanted))
    return concat_counts(chosen)


def _without_ids(parts: Folder, name: str) -> pa.Table:
    with parts.open_parquet(name) as file:
        return file.read(columns=[column for column in file.schema_arrow.names if column != "ids"])


def read_lengths(parts: Folder, batch_idx: Sequence[int] | None = None) -> RoutingCounts:
    """Token numbers of every example, or those of some batches, with counts of no layer and no expert: (N, 0, 0)."""
    names = ["batch_idx", "in_batch_idx", "label", "category", "role", "num_tokens"]
    frame = pd.concat([table.to_pandas() for _, table in _scan(parts, names)], ignore_index=True)
    if batch_idx is not None:
        frame = frame[frame["batch_idx"].isin(batch_idx)]
    info = parts_info(parts)
    return RoutingCounts(
        **{name: frame[name].to_numpy() for name in names},
        counts_NLE=np.zeros((len(frame), 0, 0), dtype=np.int32),
        layers=(),
        num_experts_per_tok=info.num_experts_per_tok,
    )


def count_tokens(parts: Folder) -> int:
    """Counted tokens of all examples."""
    return sum(int(pc.sum(table["num_tokens"]).as_py() or 0) for _, table in _scan(parts, ["num_tokens"]))


def batches_in_parts(parts: Folder, roles: Sequence[str]) -> pd.DataFrame:
    """One row per batch and part that holds some of it: `batch_idx, part, safe, unsafe` (tokens in these roles)."""
    rows = []
    for name, table in _scan(parts, ["batch_idx", "label", "role", "num_tokens"]):
        kept = table.filter(pc.is_in(table["role"], pa.array(list(roles))))
        sums = kept.group_by(["batch_idx", "label"]).aggregate([("num_tokens", "sum")]).to_pandas()
        wide = sums.pivot_table(index="batch_idx", columns="label", values="num_tokens_sum", fill_value=0)
        wide = wide.reindex(columns=["safe", "unsafe"], fill_value=0).reset_index().assign(part=name)
        rows.append(wide)
    found: pd.DataFrame = pd.concat(rows, ignore_index=True)[["batch_idx", "part", "safe", "unsafe"]]
    return found


def _scan(parts: Folder, columns: list[str]) -> Iterator[tuple[str, pa.Table]]:
    for name in parts.parquet_names():
        with parts.open_parquet(name) as file:
            yield name, file.read(columns=columns)
