"""Parts of a capture: what is done is known from key columns, and nothing is counted twice."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from moe_ray.identification.confounds import length_table
from moe_ray.routing.count_store import (
    batches_in_parts,
    count_tokens,
    keys_of,
    parts_info,
    plan_windows,
    read_batches,
    read_counts,
    read_lengths,
    remove_doubles,
    rows_without,
)
from moe_ray.routing.count_tables import counts_to_table
from moe_ray.storage.folder import Folder
from moe_ray.testing.simulated_counts import Population, simulate

COUNTS = simulate(Population(num_layers=2, num_experts=4, num_experts_per_tok=2), num_batches=4)


@pytest.fixture
def parts(tmp_path):
    """Two parts that share batch 1."""
    folder = Folder.open(str(tmp_path))
    first = (COUNTS.batch_idx < 1) | ((COUNTS.batch_idx == 1) & (COUNTS.in_batch_idx < 5))
    folder.write_table("part-a.parquet", counts_to_table(COUNTS.take(first)))
    folder.write_table("part-b.parquet", counts_to_table(COUNTS.take(~first)))
    return folder


@given(sizes=st.lists(st.integers(1, 40), max_size=40), max_rows=st.integers(1, 60))
def test_windows_hold_whole_batches_and_every_example_once(sizes, max_rows):
    batch_idx = np.repeat(np.arange(len(sizes)) * 3, sizes)
    windows = plan_windows(batch_idx, max_rows=max_rows)
    assert np.array_equal(np.concatenate([*windows, np.empty(0, int)]), np.arange(len(batch_idx)))
    held = [set(batch_idx[window]) for window in windows]
    assert sum(map(len, held)) == len(sizes)
    assert all(len(window) <= max_rows or len(batches) == 1 for window, batches in zip(windows, held, strict=True))


def test_what_is_not_in_the_parts_is_to_be_done(parts):
    keys = keys_of([0, 1, 7, 1], [0, 15, 2, 3])
    assert rows_without(keys, parts, parts.parquet_names()).tolist() == [2]
    assert rows_without(keys, parts, ["part-a.parquet"]).tolist() == [1, 2]


def test_what_is_done_is_known_without_reading_a_count(parts, monkeypatch):
    monkeypatch.setattr(Folder, "read_bytes", None)
    monkeypatch.setattr(Folder, "read_table", None)
    assert len(rows_without(keys_of(COUNTS.batch_idx, COUNTS.in_batch_idx), parts, parts.parquet_names())) == 0
    assert count_tokens(parts) == COUNTS.num_tokens.sum()
    assert parts_info(parts).num_experts == 4


def test_a_row_that_was_written_twice_is_kept_once(parts):
    parts.write_table("part-c.parquet", counts_to_table(COUNTS.take(COUNTS.batch_idx >= 3)))
    doubled = counts_to_table(replace(COUNTS.take(COUNTS.batch_idx == 0), batch_idx=np.repeat([0, 9], 8)))
    parts.write_table("part-d.parquet", doubled)
    assert remove_doubles(parts) == 16 + 8
    counts = read_counts(parts)
    assert len(counts) == len(COUNTS) + 8
    assert np.array_equal(counts.counts_NLE[: len(COUNTS)], COUNTS.counts_NLE)
    assert remove_doubles(parts) == 0


def test_a_batch_is_read_whole_from_the_parts_that_share_it(parts):
    found = batches_in_parts(parts, ["prompt"])
    names = found.loc[found["batch_idx"] == 1, "part"].tolist()
    assert names == ["part-a.parquet", "part-b.parquet"]
    wanted = COUNTS.take(COUNTS.batch_idx == 1)
    got = read_batches(parts, names, [1])
    assert len(read_batches(parts, names, [0])) == 16  # one of the parts has nothing of it
    assert np.array_equal(got.counts_NLE, wanted.counts_NLE)
    assert np.array_equal(got.in_batch_idx, wanted.in_batch_idx)
    tokens = found.groupby("batch_idx")[["safe", "unsafe"]].sum()
    assert tokens.loc[1].tolist() == [wanted.num_tokens[wanted.label == label].sum() for label in ("safe", "unsafe")]


def test_lengths_are_told_without_counts(parts):
    lengths = read_lengths(parts, [0, 2])
    assert lengths.counts_NLE.size == 0
    expected = length_table(COUNTS)
    assert length_table(lengths).equals(expected[expected["batch_idx"].isin([0, 2])].reset_index(drop=True))
