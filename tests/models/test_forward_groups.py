"""Rows in groups for forward passes: every row once, within the limits, with little padding."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from moe_ray.models.forward_groups import group_by_length

LENGTHS = st.lists(st.integers(1, 5000), max_size=200)


def padded_tokens(lengths, group):
    return len(group) * max(lengths[row] for row in group)


@given(
    lengths=LENGTHS,
    max_rows=st.integers(0, 20),
    max_tokens=st.integers(0, 10_000),
    max_padding=st.sampled_from([0.0, 0.1, 0.5, 1.0]),
)
def test_every_row_is_in_one_group_within_all_limits(lengths, max_rows, max_tokens, max_padding):
    groups = group_by_length(lengths, max_rows=max_rows, max_tokens=max_tokens, max_padding=max_padding)
    assert sorted(row for group in groups for row in group) == list(range(len(lengths)))
    for group in groups:
        padded, real = padded_tokens(lengths, group), sum(lengths[row] for row in group)
        assert not max_rows or len(group) <= max_rows
        assert not max_tokens or padded <= max_tokens or len(group) == 1
        assert padded - real <= max_padding * padded


@given(lengths=LENGTHS, max_rows=st.integers(1, 20))
def test_no_group_is_cut_before_it_is_full(lengths, max_rows):
    groups = group_by_length(lengths, max_rows=max_rows)
    assert [len(group) for group in groups[:-1]] == [max_rows] * (len(groups) - 1)


@given(lengths=LENGTHS)
def test_the_longest_rows_come_first_and_rows_of_one_length_keep_their_order(lengths):
    order = [row for group in group_by_length(lengths, max_rows=3) for row in group]
    assert order == sorted(order, key=lambda row: (-lengths[row], row))


def test_padding_of_mixed_lengths_stays_under_a_tenth_in_few_forward_passes():
    lengths = np.random.default_rng(0).lognormal(5, 0.8, 1024).astype(int) + 1
    groups = group_by_length(lengths.tolist(), max_tokens=8192, max_padding=0.1)
    padded = sum(padded_tokens(lengths, group) for group in groups)
    in_order = sum(padded_tokens(lengths, range(start, start + 32)) for start in range(0, 1024, 32))
    assert 1 - lengths.sum() / padded < 0.1 < 1 - lengths.sum() / in_order
    assert len(groups) < 2 * np.ceil(lengths.sum() / 8192)
