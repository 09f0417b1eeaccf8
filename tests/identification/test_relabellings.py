"""Relabellings are all those that keep each stratum's numbers, the observed one first."""

from __future__ import annotations

import math

import numpy as np
import pytest

from moe_ray.identification.relabellings import Strata, canonical_order, group_of_each, relabellings


def as_sets(strata: Strata, limit: int = 20_000) -> list[tuple[int, ...]]:
    """Every relabelling as the examples called unsafe, opposites written out."""
    labels = relabellings(strata, limit, 0)
    columns = labels.unsafe_NP.T.astype(bool)
    columns = np.vstack([columns, ~columns]) if labels.is_mirrored else columns
    return [tuple(np.flatnonzero(column)) for column in columns]


@pytest.mark.parametrize(
    ("strata", "total"),
    [
        (((16, 8),), 12_870),
        (((2, 1),) * 8, 256),
        (((5, 2),), 10),
        (((6, 3), (2, 1), (2, 1)), 80),
        (((4, 1), (2, 1)), 8),
    ],
)
def test_all_relabellings_are_there_once(strata: Strata, total: int) -> None:
    sets = as_sets(strata)
    assert relabellings(strata, 20_000, 0).num == len(sets) == total
    assert len(set(sets)) == total
    assert relabellings(strata, 20_000, 0).is_exact


@pytest.mark.parametrize("limit", [100, 20_000])
@pytest.mark.parametrize("strata", [((12, 6),), ((4, 2), (2, 1), (2, 1)), ((7, 3),)])
def test_strata_keep_their_numbers_and_the_observed_labels_come_first(strata: Strata, limit: int) -> None:
    columns_NP = relabellings(strata, limit, 3).unsafe_NP
    start = 0
    for size, unsafe in strata:
        rows = columns_NP[start : start + size]
        assert (rows.sum(axis=0) == unsafe).all()
        assert rows[:, 0].tolist() == [1] * unsafe + [0] * (size - unsafe)
        start += size


def test_above_the_limit_that_many_are_drawn_by_seed() -> None:
    drawn = relabellings(((32, 16),), 1000, 0)
    assert drawn.num == 1000
    assert not drawn.is_exact
    assert math.comb(32, 16) > 1000
    assert (drawn.unsafe_NP != relabellings(((32, 16),), 1000, 1).unsafe_NP).any()


@pytest.mark.slow
def test_equal_make_up_shares_one_read_only_set() -> None:
    assert relabellings(((16, 8),), 20_000, 0) is relabellings(((16, 8),), 20_000, 0)
    assert not relabellings(((16, 8),), 20_000, 0).unsafe_NP.flags.writeable


def test_pairs_are_strata_and_incomplete_pairs_are_single_examples() -> None:
    is_unsafe = np.array([True, False, False, True, True, False])
    pairs = np.array(["a", "b", "a", "c", None, "b"], dtype=object)
    groups = group_of_each(is_unsafe, pairs)
    assert groups.tolist() == [1, 0, 1, 0, 0, 0]
    order, strata = canonical_order(is_unsafe, groups)
    assert strata == ((4, 2), (2, 1))
    assert is_unsafe[order].tolist() == [True, True, False, False, True, False]
