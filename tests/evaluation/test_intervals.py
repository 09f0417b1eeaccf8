"""A rate, a mean and a difference carry their interval and their number, whatever repeats in the sample."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from moe_ray.evaluation.intervals import clustered_mean, clustered_rate, paired_difference, rate


def test_a_rate_of_nothing_is_not_a_number_and_says_so():
    assert math.isnan(rate(0, 0).value)
    assert rate(0, 0).as_dict() == {"value": None, "n": 0, "low": None, "high": None}
    assert clustered_rate([], []).n == 0
    assert math.isnan(paired_difference(np.array([], bool), np.array([], bool)).value)


@given(st.lists(st.booleans(), min_size=1, max_size=60))
def test_clusters_of_one_give_the_wilson_interval(hits):
    assert clustered_rate(hits, range(len(hits))) == rate(sum(hits), len(hits))


def test_answers_that_only_repeat_each_other_count_once():
    hits = np.array([True, False, True, True, False, True, False, False, True, True, False, True])
    repeated = clustered_rate(np.repeat(hits, 5), np.repeat(np.arange(12), 5))
    once = clustered_rate(hits, range(12))
    assert repeated.value == once.value
    assert repeated.n == 60
    assert repeated.high - repeated.low >= once.high - once.low


@given(st.lists(st.tuples(st.booleans(), st.booleans()), min_size=1, max_size=40), st.integers(1, 4))
def test_swapping_before_and_after_turns_the_difference_around(pairs, size):
    before, after = np.array(pairs).T
    clusters = np.arange(len(pairs)) // size
    there, back = (
        paired_difference(before, after, clusters=clusters),
        paired_difference(after, before, clusters=clusters),
    )
    assert (there.value, there.low, there.high) == pytest.approx((-back.value, -back.high, -back.low))
    assert -1 <= there.low <= there.value <= there.high <= 1


def test_pairing_makes_the_interval_narrower_where_the_same_examples_stay_refused():
    before = np.arange(60) < 30
    kept = paired_difference(before, np.arange(60) < 36)
    shuffled = paired_difference(before, np.random.default_rng(0).permutation(np.arange(60) < 36))
    assert kept.value == shuffled.value == pytest.approx(0.1)
    assert kept.high - kept.low < 0.7 * (shuffled.high - shuffled.low)
    assert kept.low > 0


def test_a_mean_is_weighted_by_tokens():
    got = clustered_mean([1.0, 4.0], weights=[3, 1])
    assert (got.value, got.n) == (1.75, 2)
    assert math.isnan(clustered_mean([1.0]).low)


def test_the_same_seed_gives_the_same_interval():
    values = np.random.default_rng(2).exponential(size=30)
    assert clustered_mean(values, seed=5) == clustered_mean(values, seed=5) != clustered_mean(values, seed=6)


def test_lengths_that_differ_are_refused():
    with pytest.raises(ValueError, match="two equal lengths"):
        paired_difference(np.array([True]), np.array([True, False]))
