"""Parts of routing counts that are damaged or foreign end in a sentence that names the file."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
from damage import damaged, refusal_of
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from moe_ray.errors import InputError
from moe_ray.routing.count_keys import all_keys, remove_doubles, remove_unreadable
from moe_ray.routing.count_store import (
    batches_in_parts,
    digest_of_parts,
    parts_info,
    read_batches,
    read_counts,
    read_lengths,
)
from moe_ray.routing.count_tables import counts_to_table
from moe_ray.storage.folder import Folder
from moe_ray.testing.simulated_counts import Population, simulate

COUNTS = simulate(Population(num_layers=2, num_experts=4, num_experts_per_tok=2), num_batches=3)
NAME = "part-b.parquet"
READERS = (
    *(parts_info, digest_of_parts, read_counts, read_lengths, remove_doubles),
    lambda parts: all_keys(parts, parts.parquet_names()),
    lambda parts: batches_in_parts(parts, ["prompt"]),
    lambda parts: read_batches(parts, parts.parquet_names(), [2]),
)


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    return Folder.open(str(tmp_path_factory.mktemp("counts")))


@pytest.mark.slow
@settings(max_examples=150, suppress_health_check=list(HealthCheck), database=None)
@given(st.data())
def test_damage(parts, data):
    parts.write_table(NAME, counts_to_table(COUNTS), row_group_size=16)
    parts.write_bytes(NAME, data.draw(damaged(parts.read_bytes(NAME))))
    for read in READERS:
        said = refusal_of(lambda read=read: read(parts))
        assert said is None or (NAME in said and len(said) < 1000)


@pytest.mark.parametrize("read", READERS)
def test_a_foreign_table_is_named(tmp_path, read):
    parts = Folder.open(str(tmp_path))
    parts.write_table(NAME, pd.DataFrame({"a": [1, 2]}))
    with pytest.raises(InputError, match=r"part-b\.parquet is damaged or foreign"):
        read(parts)


def test_a_part_without_a_footer_is_counted_again(tmp_path, caplog):
    parts = Folder.open(str(tmp_path))
    first = COUNTS.batch_idx == 0
    parts.write_table("part-a.parquet", counts_to_table(COUNTS.take(first)))
    parts.write_table(NAME, counts_to_table(COUNTS.take(~first)))
    remove_unreadable(parts)
    assert parts.parquet_names() == ["part-a.parquet", NAME]
    parts.write_bytes(NAME, parts.read_bytes(NAME)[:-8])
    remove_unreadable(parts)
    assert parts.parquet_names() == ["part-a.parquet"]
    assert "its examples are counted again" in caplog.text
    assert np.array_equal(read_counts(parts).counts_NLE, COUNTS.take(first).counts_NLE)
