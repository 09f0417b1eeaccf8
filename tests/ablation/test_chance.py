"""Relabellings: cases counted by hand, and a level that holds where nothing is going on."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest

from moe_ray.ablation.chance import Labelled, holm, label_p, set_p

NO_PAIRS = None


def labelled(unsafe, safe, pairs=NO_PAIRS):
    values = np.array([*unsafe, *safe], dtype=float)
    is_unsafe = np.arange(len(values)) < len(unsafe)
    return Labelled(values, is_unsafe, np.array(pairs or [None] * len(values), dtype=object))


def test_three_against_three_is_one_of_twenty_where_all_unsafe_effects_are_larger():
    assert label_p([labelled([3.0, 2.5, 2.0], [0.0, 0.1, 0.2])], limit=1000, seed=0) == 1 / 20


def test_every_relabelling_is_counted_as_worked_by_hand():
    """4, 1 unsafe and 2, 0 safe. Differences over their standard errors, of which two are at least 0.83:

    {4,1}: 1.5 / sqrt(4.5/2 + 2/2) = 0.832   {4,2}: 2.5 / sqrt(2/2 + 0.5/2) = 2.236   the others are smaller.
    """
    assert label_p([labelled([4.0, 1.0], [2.0, 0.0])], limit=1000, seed=0) == 2 / 6


def test_pairs_trade_labels_inside_themselves_only():
    assert label_p([labelled([3.0, 2.5, 2.0], [0.0, 0.1, 0.2], pairs=["a", "b", "c"] * 2)], limit=1000, seed=0) == 1 / 8


def test_effects_that_do_not_vary_are_told_apart_and_equal_ones_are_not():
    assert label_p([labelled([2.0] * 4, [0.0] * 4)], limit=1000, seed=0) == 1 / 70
    assert label_p([labelled([1.0] * 4, [1.0] * 4)], limit=1000, seed=0) == 1


def test_of_several_batches_the_observed_labels_are_among_those_drawn():
    batches = [labelled([3.0, 2.5, 2.0], [0.0, 0.1, 0.2]) for _ in range(5)]
    assert label_p(batches, limit=1000, seed=0) <= 2 / 1000
    assert label_p(batches, limit=1000, seed=0) >= 1 / 1000


def test_without_any_batch_nothing_is_known():
    assert math.isnan(label_p([], limit=100, seed=0))
    assert math.isnan(set_p(np.zeros(0), np.zeros((0, 5)), limit=100, seed=0))


@pytest.mark.parametrize(("draws", "expected"), [([[0.0, 0.1, 0.2]], 1 / 4), ([[2.0, 0.1, 0.2]], 2 / 4)])
def test_among_the_sets_of_one_batch_p_is_the_rank(draws, expected):
    assert set_p(np.array([1.0]), np.array(draws), limit=1000, seed=0) == expected


def test_two_batches_of_three_sets_have_nine_relabellings_counted_one_by_one():
    own, draws = np.array([1.0, 0.4]), np.array([[0.2, 0.5], [0.1, 0.6]])
    values = np.column_stack([own, draws])
    lifts = [
        np.mean([row[i] - (row.sum() - row[i]) / 2 for row, i in zip(values, choice, strict=True)])
        for choice in itertools.product(range(3), repeat=2)
    ]
    assert set_p(own, draws, limit=1000, seed=0) == np.mean([lift >= lifts[0] - 1e-12 for lift in lifts])


def test_more_choices_than_the_limit_are_drawn_with_the_observed_one_among_them():
    own, draws = np.full(12, 5.0), np.zeros((12, 5))
    assert set_p(own, draws, limit=500, seed=0) == 1 / 500


def test_a_batch_with_fewer_draws_counts_with_those_it_has():
    assert set_p(np.array([1.0]), np.array([[0.5, math.nan, math.nan]]), limit=100, seed=0) == 1 / 2


def test_holms_correction_as_by_hand():
    assert holm(np.array([0.01, math.nan, 0.04, 0.03])) == pytest.approx([0.03, math.nan, 0.06, 0.06], nan_ok=True)


@pytest.mark.slow
@pytest.mark.parametrize(("num_unsafe", "scale"), [(8, 1.0), (8, 4.0), (5, 3.0), (4, 0.25)])
def test_labels_that_mean_nothing_are_called_significant_in_one_of_twenty(num_unsafe, scale):
    """Equal means, unlike numbers and spreads: the division by each label's own error keeps the level."""
    rng = np.random.default_rng(0)
    batches = 400
    found = [
        label_p(
            [labelled(rng.normal(size=num_unsafe) * scale, rng.normal(size=8)) for _ in range(4)], limit=200, seed=trial
        )
        for trial in range(batches)
    ]
    assert np.mean(np.array(found) <= 0.05) <= 0.07
    assert np.mean(np.array(found) <= 0.5) == pytest.approx(0.5, abs=0.1)


def test_sets_that_are_like_any_other_are_called_significant_in_one_of_twenty():
    rng = np.random.default_rng(0)
    found = []
    for trial in range(400):
        values = rng.standard_t(3, size=(6, 6)) + rng.normal(size=(6, 1))
        found.append(set_p(values[:, 0], values[:, 1:], limit=400, seed=trial))
    assert np.mean(np.array(found) <= 0.05) <= 0.07
