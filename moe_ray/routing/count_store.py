"""The parts of a capture: Parquet files of counts, each written whole, that together hold every example once.

Which examples they hold is read by `count_keys`.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from moe_ray.errors import InputError
from moe_ray.routing.count_tables import table_to_counts
from moe_ray.routing.counts import RoutingCounts, concat_counts
from moe_ray.storage.damage import reading
from moe_ray.storage.fingerprint import content_hash
from moe_ray.storage.folder import Folder

MAX_ROWS_PER_GROUP = 512
"""Rows in a row group of a part: what is loaded to read one batch of it."""


class PartsInfo(NamedTuple):
    """What all parts have in common."""

    layers: tuple[int, ...]
    num_experts: int
    num_experts_per_tok: int


def parts_info(parts: Folder) -> PartsInfo:
    """What all parts have in common, from the first one.

    Raises:
        InputError: there is none.
    """
    names = parts.parquet_names()
    if not names:
        raise InputError("no routing counts; capture at least one batch")
    with parts.open_parquet(names[0]) as file, _decoding(parts, names[0]):
        schema = file.schema_arrow
        about = json.loads(schema.metadata[b"moe_ray"])
        num_experts = schema.field("counts").type.shape[1]
        return PartsInfo(tuple(about["layers"]), num_experts, int(about["num_experts_per_tok"]))


def digest_of_parts(parts: Folder) -> str:
    """A hash of all stored counts, the same however they are cut into parts; reads no counts."""
    total, about = 0, dict[str, Any]()
    for name in parts.parquet_names():
        with parts.open_parquet(name) as file, _decoding(parts, name):
            about = json.loads(file.schema_arrow.metadata[b"moe_ray"])
            total = (total + int(about.pop("digest"), 16)) % (1 << 64)
    return content_hash([about, total])


def read_counts(parts: Folder) -> RoutingCounts:
    """All counts of a finished capture, without raw ids, ordered by batch and position in it.

    Of a large capture, read some at a time with `read_batches`.
    """
    chosen = []
    for name in parts.parquet_names():
        with parts.open_parquet(name) as file, _decoding(parts, name):
            chosen.append(table_to_counts(file.read(columns=_without_ids(file))))
    return concat_counts(chosen)


def read_batches(parts: Folder, names: Sequence[str], batch_idx: Sequence[int]) -> RoutingCounts:
    """The counts of some batches, from the parts that hold them; only row groups that may hold some are loaded."""
    wanted, chosen = np.unique(np.asarray(batch_idx, dtype=np.int64)), []
    for name in names:
        with parts.open_parquet(name) as file, _decoding(parts, name):
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
        with parts.open_parquet(name) as file, _decoding(parts, name):
            table = file.read(columns=columns).select(columns)
        yield name, table


def _decoding(parts: Folder, name: str) -> AbstractContextManager[None]:
    return reading(parts.file(name), expected="a part of the routing counts")
