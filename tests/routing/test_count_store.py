"""Parts of a capture: what is done is known from key columns, and nothing is counted twice."""

import uuid
from dataclasses import replace

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_ray.identification.confounds import length_table
from moe_ray.routing.count_keys import all_keys, keys_of, remove_doubles, rows_without
from moe_ray.routing.count_store import (
    batches_in_parts,
    count_tokens,
    digest_of_parts,
    parts_info,
    plan_reads,
    read_batches,
    read_counts,
    read_lengths,
)
from moe_ray.routing.count_tables import counts_to_table, table_to_counts
from moe_ray.routing.counts import concat_counts
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


PLACES = st.tuples(st.integers(0, 3), st.integers(0, 15))
"""`batch_idx` and `in_batch_idx` of an example of `COUNTS`."""
CONTENTS = st.lists(st.lists(PLACES, min_size=1, max_size=12, unique=True), min_size=1, max_size=6)
"""Which examples each part holds, some of them several parts."""


def rows_of(places):
    """Both roles of each of the examples, in the order in which a part stores them."""
    frame = COUNTS.to_frame()
    chosen = COUNTS.take(frame.index[pd.MultiIndex.from_frame(frame[["batch_idx", "in_batch_idx"]]).isin(places)])
    return concat_counts([chosen, replace(chosen, role=np.full(len(chosen), "response", dtype=object))])


def written(contents):
    """A folder with these parts."""
    folder = Folder.open(f"memory://{uuid.uuid4().hex}")
    for number, places in enumerate(contents):
        table = counts_to_table(rows_of(places))
        folder.write_table(f"part-{number}.parquet", table, row_group_size=3)
    return folder


@pytest.mark.slow
@given(contents=CONTENTS)
@settings(max_examples=15)
def test_the_first_part_that_holds_an_example_keeps_it(contents):
    parts, seen, expected, removed = written(contents), set(), {}, 0
    for number, places in enumerate(contents):
        kept = [place for place in places if place not in seen]
        removed += 2 * (len(places) - len(kept))  # a row for each role
        seen.update(kept)
        if kept:
            expected[f"part-{number}.parquet"] = rows_of(kept)
    assert remove_doubles(parts) == removed
    assert parts.parquet_names() == list(expected)
    for name, counts in expected.items():
        got = table_to_counts(parts.read_table(name))
        assert got.to_frame().equals(counts.to_frame())
        assert np.array_equal(got.counts_NLE, counts.counts_NLE)
    # A capture that wrote nothing twice has the same digest.
    assert digest_of_parts(parts) == digest_of_parts(written([sorted(seen)]))


@pytest.mark.slow
@given(contents=CONTENTS, roles=st.sampled_from([["prompt"], ["response"], ["prompt", "response"]]))
@settings(max_examples=15)
def test_tokens_of_batches_and_parts_are_those_of_their_rows(contents, roles):
    expected = []
    for number, places in enumerate(contents):
        rows = rows_of(places).to_frame()
        rows = rows[rows["role"].isin(roles)]
        for batch_idx, of_batch in rows.groupby("batch_idx"):
            tokens = [int(of_batch.loc[of_batch["label"] == label, "num_tokens"].sum()) for label in ("safe", "unsafe")]
            expected.append((batch_idx, f"part-{number}.parquet", *tokens))
    found = batches_in_parts(written(contents), roles)
    assert list(found.columns) == ["batch_idx", "part", "safe", "unsafe"]
    assert [tuple(row) for row in found.to_dict("split")["data"]] == expected


@pytest.mark.slow
@given(contents=CONTENTS, batches_at_once=st.integers(1, 5))
@settings(max_examples=15)
def test_a_plan_names_every_batch_once_with_the_parts_that_hold_it(contents, batches_at_once):
    plan = list(plan_reads(batches_in_parts(written(contents), ["prompt"]), batches_at_once=batches_at_once))
    batches = sorted({batch for places in contents for batch, _ in places})
    assert [batch for group, _ in plan for batch in group] == batches
    assert all(len(group) == batches_at_once for group, _ in plan[:-1])
    for group, names in plan:
        holds = [
            f"part-{number}.parquet" for number, places in enumerate(contents) if {b for b, _ in places} & {*group}
        ]
        assert names == holds


@pytest.mark.slow
@given(contents=CONTENTS, wanted=st.lists(PLACES, max_size=20))
@settings(max_examples=15)
def test_what_is_to_be_done_is_what_no_part_holds(contents, wanted):
    parts = written(contents)
    done = {place for places in contents for place in places}
    keys = keys_of([batch for batch, _ in wanted], [place for _, place in wanted])
    todo = rows_without(keys, parts, parts.parquet_names())
    assert todo.tolist() == [row for row, place in enumerate(wanted) if place not in done]
    assert all_keys(parts, parts.parquet_names()).tolist() == [int(keys_of(*place)) for place in sorted(done)]


@pytest.mark.slow
@given(contents=CONTENTS, wanted=st.sets(st.integers(0, 3), min_size=1))
@settings(max_examples=15)
def test_batches_are_read_whole_however_the_parts_are_cut(contents, wanted):
    parts = written(contents)
    chosen = [[place for place in places if place[0] in wanted] for places in contents]
    if not any(chosen):
        return
    expected = concat_counts([rows_of(places) for places in chosen if places])
    got = read_batches(parts, parts.parquet_names(), sorted(wanted))
    assert got.to_frame().equals(expected.to_frame())
    assert np.array_equal(got.counts_NLE, expected.counts_NLE)


def test_only_the_row_groups_of_a_batch_are_loaded(parts, monkeypatch):
    parts.write_table("part-c.parquet", counts_to_table(COUNTS), row_group_size=16)
    loaded = []
    read = pq.ParquetFile.read_row_groups
    monkeypatch.setattr(
        pq.ParquetFile,
        "read_row_groups",
        lambda self, groups, **named: loaded.append(groups) or read(self, groups, **named),
    )
    assert np.array_equal(
        read_batches(parts, ["part-c.parquet"], [2]).counts_NLE, COUNTS.take(COUNTS.batch_idx == 2).counts_NLE
    )
    assert loaded == [[2]]


@pytest.mark.slow
@pytest.mark.parametrize(
    "work",
    [
        remove_doubles,
        count_tokens,
        digest_of_parts,
        lambda parts: batches_in_parts(parts, ["prompt"]),
        lambda parts: rows_without(np.arange(5), parts, parts.parquet_names()),
    ],
)
def test_every_part_is_opened_once_and_sorted_once(work, monkeypatch):
    """The work grows as the parts do: each is read once, and no array of all parts is made for each of them."""
    contents = [[(number % 4, number // 4)] for number in range(40)]
    parts, opened, sizes = written(contents), [], []
    open_parquet, unique = Folder.open_parquet, np.unique
    monkeypatch.setattr(
        Folder, "open_parquet", lambda self, name, **named: opened.append(name) or open_parquet(self, name, **named)
    )
    monkeypatch.setattr(np, "unique", lambda array, **named: sizes.append(len(array)) or unique(array, **named))
    work(parts)
    assert sorted(opened) == parts.parquet_names()
    assert sum(sizes) <= 2 * 2 * len(contents)  # a row for each role, alone and once with all others
