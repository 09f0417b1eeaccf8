"""Routing counts as Arrow tables, and back."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from moe_ray.routing.counts import RoutingCounts


def counts_to_table(counts: RoutingCounts) -> pa.Table:
    """Routing counts as a table with a fixed-shape (layers, experts) int32 tensor column.

    Raw routed ids, where captured, are a column `ids` of flat lists; a row's list has the shape (`num_tokens`, layers,
    `num_experts_per_tok`).
    """
    columns = {
        "batch_idx": pa.array(counts.batch_idx),
        "in_batch_idx": pa.array(counts.in_batch_idx),
        "label": pa.array(counts.label, pa.string()),
        "category": pa.array(counts.category, pa.string()),
        "role": pa.array(counts.role, pa.string()),
        "num_tokens": pa.array(counts.num_tokens),
        "counts": pa.FixedShapeTensorArray.from_numpy_ndarray(np.ascontiguousarray(counts.counts_NLE)),
    }
    if counts.pair is not None:
        columns["pair"] = pa.array(counts.pair, pa.string())
    if counts.weights_NLE is not None:
        columns["weights"] = pa.FixedShapeTensorArray.from_numpy_ndarray(np.ascontiguousarray(counts.weights_NLE))
    if counts.ids is not None:
        columns["ids"] = _lists_column(counts.ids)
    about = {
        "layers": list(counts.layers),
        "num_experts_per_tok": counts.num_experts_per_tok,
        "digest": f"{counts_digest(counts):016x}",
    }
    return pa.table(columns).replace_schema_metadata({"moe_ray": json.dumps(about)})


def counts_digest(counts: RoutingCounts) -> int:
    """A 64-bit number that is the same for the same rows in any order; those of disjoint sets of rows add up, modulo 2^64.

    So the digest of a whole capture comes from its parts, however many processes wrote them and wherever they were cut.
    """
    total = 0
    for row in range(len(counts)):
        names = ("batch_idx", "in_batch_idx", "label", "category", "role", "num_tokens", "pair")
        values = [getattr(counts, name) for name in names]
        digest = hashlib.blake2b(repr([None if v is None else str(v[row]) for v in values]).encode(), digest_size=8)
        for array in (counts.counts_NLE, counts.weights_NLE, counts.ids):
            digest.update(b"" if array is None else np.ascontiguousarray(array[row]).tobytes())
        total = (total + int.from_bytes(digest.digest())) % (1 << 64)
    return total


def table_to_counts(table: pa.Table) -> RoutingCounts:
    """The routing counts that `counts_to_table` wrote."""
    about = json.loads(table.schema.metadata[b"moe_ray"])
    names = ("label", "category", "role", "pair") if "pair" in table.column_names else ("label", "category", "role")
    text = {name: np.asarray(table.column(name).to_pylist(), dtype=object) for name in names}
    numbers = {name: table.column(name).to_numpy() for name in ("batch_idx", "in_batch_idx", "num_tokens")}
    return RoutingCounts(
        **text,
        **numbers,
        counts_NLE=_tensor_column(table, "counts"),
        weights_NLE=_tensor_column(table, "weights") if "weights" in table.column_names else None,
        ids=_arrays_of_lists(table.column("ids"), numbers["num_tokens"], about)
        if "ids" in table.column_names
        else None,
        layers=tuple(about["layers"]),
        num_experts_per_tok=about["num_experts_per_tok"],
    )


def _lists_column(arrays: npt.NDArray[np.object_]) -> pa.Array:
    """One flat list per array; the values keep their type."""
    ends = np.cumsum([0, *(array.size for array in arrays)], dtype=np.int64)
    values = np.concatenate([array.reshape(-1) for array in arrays]) if len(arrays) else np.empty(0, dtype=np.uint8)
    return pa.LargeListArray.from_arrays(pa.array(ends), pa.array(values))


def _arrays_of_lists(
    column: pa.ChunkedArray, num_tokens: npt.NDArray[np.int64], about: Mapping[str, Any]
) -> npt.NDArray[np.object_]:
    """Views of shape (num_tokens, layers, experts per token) of one flat list each."""
    lists = column.combine_chunks()
    values, ends = lists.values.to_numpy(), lists.offsets.to_numpy()
    arrays = np.empty(len(lists), dtype=object)
    for row, tokens in enumerate(num_tokens):
        shape = (int(tokens), len(about["layers"]), about["num_experts_per_tok"])
        arrays[row] = values[ends[row] : ends[row + 1]].reshape(shape)
    return arrays


def _tensor_column(table: pa.Table, name: str) -> Any:
    return table.column(name).combine_chunks().to_numpy_ndarray()
