"""Which examples the parts of a capture hold, read from their key columns alone, a part at a time.

So neither resuming nor planning loads counts.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from moe_ray.errors import InputError
from moe_ray.routing.count_tables import counts_to_table, table_to_counts
from moe_ray.storage.damage import reading
from moe_ray.storage.folder import Folder

_KEYS = ["batch_idx", "in_batch_idx"]
_PLACES_PER_BATCH = 1 << 20

logger = logging.getLogger(__name__)


def keys_of(batch_idx: npt.ArrayLike, in_batch_idx: npt.ArrayLike) -> npt.NDArray[np.int64]:
    """One number per example."""
    return np.asarray(batch_idx, dtype=np.int64) * _PLACES_PER_BATCH + np.asarray(in_batch_idx, dtype=np.int64)


def read_keys(folder: Folder, name: str) -> npt.NDArray[np.int64]:
    """`keys_of` the rows of a Parquet file; nothing else of it is read."""
    with folder.open_parquet(name) as file, reading(folder.file(name), expected=f"columns {' and '.join(_KEYS)}"):
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


def remove_unreadable(parts: Folder) -> None:
    """Removes parts without a footer, as a machine leaves them whose power failed while they were written."""
    for name in parts.parquet_names():
        try:
            with parts.open_parquet(name):
                pass
        except InputError as error:
            logger.warning("%s; its examples are counted again", error)
            parts.remove(name)


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
