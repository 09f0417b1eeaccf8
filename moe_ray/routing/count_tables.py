"""Routing counts as Arrow tables, and back."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from moe_ray.routing.counts import SCORE_TENSORS, RoutingCounts

_FLOATS_AND_REFUSALS = ("weights_NLE", *SCORE_TENSORS)


def counts_to_table(counts: RoutingCounts) -> pa.Table:
    """Routing counts as a table with a fixed-shape (layers, experts) int32 tensor column, and one for each captured score.

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
        "counts": _as_tensors(counts.counts_NLE),
    }
    if counts.pair is not None:
        columns["pair"] = pa.array(counts.pair, pa.string())
    if counts.refusal_tokens is not None:
        columns["refusal_tokens"] = pa.array(counts.refusal_tokens)
    for name in _FLOATS_AND_REFUSALS:
        if (values := getattr(counts, name)) is not None:
            columns[_column(name)] = _as_tensors(values)
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
        if counts.refusal_tokens is not None:
            digest.update(str(counts.refusal_tokens[row]).encode())
        scores = (getattr(counts, name) for name in SCORE_TENSORS)
        for array in (counts.counts_NLE, counts.weights_NLE, counts.ids, *scores):
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
        **{
            name: _tensor_column(table, _column(name))
            for name in _FLOATS_AND_REFUSALS
            if _column(name) in table.column_names
        },
        refusal_tokens=table.column("refusal_tokens").to_numpy() if "refusal_tokens" in table.column_names else None,
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


def _column(name: str) -> str:
    return name.removesuffix("_NLE")


def _as_tensors(values_NLE: npt.NDArray[Any]) -> pa.Array:
    # `FixedShapeTensorArray.from_numpy_ndarray` would write a permutation of axes into the type, one that changes nothing:
    # pyarrow makes no empty table of such a type, which shuffles of Ray Data need.
    flat = pa.array(np.ascontiguousarray(values_NLE).reshape(-1))
    shape = values_NLE.shape[1:]
    rows = pa.FixedSizeListArray.from_arrays(flat, math.prod(shape))
    return pa.ExtensionArray.from_storage(pa.fixed_shape_tensor(flat.type, shape), rows)


def _tensor_column(table: pa.Table, name: str) -> Any:
    return table.column(name).combine_chunks().to_numpy_ndarray()
