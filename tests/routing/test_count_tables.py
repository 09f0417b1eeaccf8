"""Counts survive being stored as tables, with all that was counted beside them."""

from __future__ import annotations

import numpy as np
from families import NUM_EXPERTS, shared
from routed_rows import ROWS, as_counts, counts_of_ids

from moe_ray.routing.count_tables import counts_to_table, table_to_counts
from moe_ray.routing.counts import RoutingCounts, concat_counts


def some_counts():
    rng = np.random.default_rng(0)
    return RoutingCounts(
        batch_idx=np.array([3, 3]),
        in_batch_idx=np.array([0, 1]),
        label=np.array(["safe", "unsafe"], dtype=object),
        category=np.array(["fraud", "fraud"], dtype=object),
        role=np.array(["prompt", "prompt"], dtype=object),
        num_tokens=np.array([4, 5]),
        counts_NLE=rng.integers(0, 9, (2, 3, 8)).astype(np.int32),
        layers=(1, 2, 5),
        num_experts_per_tok=2,
        pair=np.array(["a", ""], dtype=object),
        weights_NLE=rng.random((2, 3, 8)).astype(np.float32),
    )


def test_routing_counts_survive_a_parquet_file(folder):
    counts = some_counts()
    folder.write_table("counts.parquet", counts_to_table(counts))
    got = table_to_counts(folder.read_table("counts.parquet"))
    assert got.counts_NLE.dtype == np.int32
    assert np.array_equal(got.counts_NLE, counts.counts_NLE)
    assert np.array_equal(got.weights_NLE, counts.weights_NLE)
    assert list(got.pair) == ["a", ""]
    assert (got.layers, got.num_experts_per_tok, list(got.label)) == ((1, 2, 5), 2, ["safe", "unsafe"])


def test_routed_ids_survive_a_table_and_keep_their_rows():
    model = shared("olmoe")
    counts = concat_counts([as_counts(model, ROWS[:2], 5, ids=True), as_counts(model, ROWS[2:], 1, ids=True)])
    kept = counts.take(counts.in_batch_idx == 0)
    got = table_to_counts(counts_to_table(kept))
    assert [ids.shape for ids in got.ids] == [(5, 2, 3), (6, 2, 3), (7, 2, 3), (4, 2, 3)]
    for ids, counts_LE in zip(got.ids, got.counts_NLE, strict=True):
        assert ids.dtype == np.uint8
        assert np.array_equal(counts_of_ids(ids, NUM_EXPERTS), counts_LE)
