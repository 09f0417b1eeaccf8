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
import pyarrow.parquet as pq

from moe_ray.errors import InputError
from moe_ray.routing.count_tables import counts_to_table, table_to_counts
from moe_ray.routing.counts import RoutingCounts, concat_counts
from moe_ray.storage.fingerprint import content_hash
from moe_ray.storage.folder import Folder

_KEYS = ["batch_idx", "in_batch_idx"]
_PLACES_PER_BATCH = 1 << 20

MAX_ROWS_PER_GROUP = 512
"""Rows in a row group of a part: what is loaded to read one batch of it."""


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


def all_keys(folder: Folder, names: Sequence[str]) -> npt.NDArray[np.int64]:
    """`keys_of` the examples in the files, ascending, an example that several rows or files hold once.

    Holds 8 bytes per example and file that has it, twice while they are sorted.
    """
    found = [np.unique(read_keys(folder, name)) for name in names]
    return np.unique(np.concatenate(found)) if found else np.empty(0, dtype=np.int64)


def rows_without(keys: npt.NDArray[np.int64], folder: Folder, names: Sequence[str]) -> npt.NDArray[np.int64]:
    """Positions in `keys` of examples that are in none of the files."""
    return np.flatnonzero(~_is_among(keys, all_keys(folder, names)))


def _is_among(keys: npt.NDArray[np.int64], ascending: npt.NDArray[np.int64]) -> npt.NDArray[np.bool_]:
    if not len(ascending):
        return np.zeros(len(keys), dtype=bool)
    found = ascending[np.minimum(np.searchsorted(ascending, keys), len(ascending) - 1)]
    is_among: npt.NDArray[np.bool_] = found == keys
    return is_among


def remove_doubles(parts: Folder) -> int:
    """Removes rows of examples that an earlier part holds too; returns how many rows.

    Such rows are left by a worker of an earlier run that was still writing. Every part's keys are read once and sorted
    once, all together; only parts that lose rows are read whole. Holds 16 bytes per example.
    """
    names = parts.parquet_names()
    found = [np.unique(read_keys(parts, name)) for name in names]
    if not found:
        return 0
    keys = np.concatenate(found)
    ascending = np.sort(keys)
    doubled = np.unique(ascending[1:][ascending[1:] == ascending[:-1]])
    if not len(doubled):
        return 0
    # The first part that holds an example keeps it: of the places of a key, in the order of parts, all but the first.
    places = np.flatnonzero(_is_among(keys, doubled))
    _, firsts = np.unique(keys[places], return_index=True)
    later = np.delete(places, firsts)
    part_of = np.searchsorted(np.cumsum([len(of_part) for of_part in found]), later, side="right")
    return sum(
        _remove_examples(parts, names[part], np.sort(keys[later[part_of == part]])) for part in np.unique(part_of)
    )


def _remove_examples(parts: Folder, name: str, ascending: npt.NDArray[np.int64]) -> int:
    """Removes the rows of the examples from a part, which goes where none is left; returns how many rows."""
    table = parts.read_table(name)
    is_doubled = _is_among(_table_keys(table), ascending)
    if is_doubled.all():
        parts.remove(name)
    else:
        # Through the counts, since a part's digest is of the rows that it holds.
        parts.write_table(name, counts_to_table(table_to_counts(table.filter(pa.array(~is_doubled)))))
    return int(is_doubled.sum())


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
    chosen = []
    for name in parts.parquet_names():
        with parts.open_parquet(name) as file:
            chosen.append(table_to_counts(file.read(columns=_without_ids(file))))
    return concat_counts(chosen)


def read_batches(parts: Folder, names: Sequence[str], batch_idx: Sequence[int]) -> RoutingCounts:
    """The counts of some batches, from the parts that hold them; only row groups that may hold some are loaded."""
    wanted, chosen = np.unique(np.asarray(batch_idx, dtype=np.int64)), []
    for name in names:
        with parts.open_parquet(name) as file:
            groups = _groups_with(file.metadata, wanted)
            table = file.read_row_groups(groups, columns=_without_ids(file))
        table = table.filter(pc.is_in(table["batch_idx"], pa.array(wanted)))
        if table.num_rows:
            chosen.append(table_to_counts(table))
    return concat_counts(chosen)


def _groups_with(footer: pq.FileMetaData, wanted: npt.NDArray[np.int64]) -> list[int]:
    """Row groups whose range of `batch_idx` holds one of the wanted ones, which are ascending."""
    column, found = footer.schema.names.index("batch_idx"), []
    for group in range(footer.num_row_groups):
        ends = footer.row_group(group).column(column).statistics
        if ends is None or not ends.has_min_max or _has_between(wanted, ends.min, ends.max):
            found.append(group)
    return found


def _has_between(ascending: npt.NDArray[np.int64], low: int, high: int) -> bool:
    return bool(np.searchsorted(ascending, low) < np.searchsorted(ascending, high, side="right"))


def _without_ids(file: pq.ParquetFile) -> list[str]:
    return [column for column in file.schema_arrow.names if column != "ids"]


def read_lengths(parts: Folder, batch_idx: Sequence[int] | None = None) -> RoutingCounts:
    """Token numbers of every example, or those of some batches, with counts of no layer and no expert: (N, 0, 0)."""
    numbers, texts = ["batch_idx", "in_batch_idx", "num_tokens"], ["label", "category", "role"]
    found: list[dict[str, npt.NDArray[Any]]] = []
    for _, table in _scan(parts, [*numbers, *texts]):
        rows = {name: table[name].to_numpy() for name in numbers} | {name: _shared(table[name]) for name in texts}
        if batch_idx is not None:
            is_wanted = np.isin(rows["batch_idx"], batch_idx)
            rows = {name: values[is_wanted] for name, values in rows.items()}
        found.append(rows)
    columns = {name: np.concatenate([rows[name] for rows in found]) for name in (*numbers, *texts)}
    return RoutingCounts(
        **columns,
        counts_NLE=np.zeros((len(columns["batch_idx"]), 0, 0), dtype=np.int32),
        layers=(),
        num_experts_per_tok=parts_info(parts).num_experts_per_tok,
    )


def _shared(column: pa.ChunkedArray) -> npt.NDArray[np.object_]:
    """A text column whose equal values are one object, so that a row takes 8 bytes."""
    encoded = column.combine_chunks().dictionary_encode(null_encoding="encode")
    values = np.array(encoded.dictionary.to_pylist(), dtype=object)
    shared: npt.NDArray[np.object_] = values[encoded.indices.to_numpy()]
    return shared


def count_tokens(parts: Folder) -> int:
    """Counted tokens of all examples."""
    return sum(int(pc.sum(table["num_tokens"]).as_py() or 0) for _, table in _scan(parts, ["num_tokens"]))


def batches_in_parts(parts: Folder, roles: Sequence[str]) -> pd.DataFrame:
    """One row per batch and part that holds some of it: `batch_idx, part, safe, unsafe` (tokens in these roles)."""
    wanted, names = pa.array(list(roles)), list[str]()
    found: list[dict[str, npt.NDArray[np.int64]]] = []
    for name, table in _scan(parts, ["batch_idx", "label", "role", "num_tokens"]):
        kept = table.filter(pc.is_in(table["role"], wanted))
        num_tokens = kept["num_tokens"].to_numpy()
        # By numpy: for the few batches of a part, tables that are grouped and pivoted cost ten times the sums.
        batches, places = np.unique(kept["batch_idx"].to_numpy(), return_inverse=True)
        tokens = {
            label: _sums(places, num_tokens * pc.equal(kept["label"], label).to_numpy(), len(batches))
            for label in ("safe", "unsafe")
        }
        found.append({"batch_idx": batches, **tokens})
        names.append(name)
    columns = {key: np.concatenate([rows[key] for rows in found]) for key in ("batch_idx", "safe", "unsafe")}
    in_part = np.repeat(np.array(names, dtype=object), [len(rows["batch_idx"]) for rows in found])
    return pd.DataFrame({"batch_idx": columns.pop("batch_idx"), "part": in_part, **columns})


def plan_reads(where: pd.DataFrame, *, batches_at_once: int) -> Iterator[tuple[list[int], list[str]]]:
    """Yields some batches at a time, ascending, with the names of the parts that hold them.

    Args:
        where: from `batches_in_parts`, of the batches that are to be read.
        batches_at_once: how many.
    """
    ordered = where.sort_values("batch_idx", kind="stable")
    names, parts = ordered["batch_idx"].to_numpy(), ordered["part"].to_numpy()
    starts = np.append(np.flatnonzero(np.diff(names, prepend=names[:1] - 1)), len(names))
    for first in range(0, len(starts) - 1, batches_at_once):
        cuts = starts[first : first + batches_at_once + 1]
        yield names[cuts[:-1]].tolist(), sorted(set(parts[cuts[0] : cuts[-1]]))


def _sums(places: npt.NDArray[np.int64], values: npt.NDArray[np.int64], number: int) -> npt.NDArray[np.int64]:
    """The sum of the values at each place, in whole numbers."""
    sums = np.zeros(number, dtype=np.int64)
    np.add.at(sums, places, values)
    return sums


def _scan(parts: Folder, columns: list[str]) -> Iterator[tuple[str, pa.Table]]:
    for name in parts.parquet_names():
        with parts.open_parquet(name) as file:
            yield name, file.read(columns=columns)
