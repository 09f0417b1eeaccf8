import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import binomtest, ttest_rel

from moe_ray.evaluation.intervals import clustered_mean, clustered_rate, paired_difference, rate

LEAST_COVERAGE = 0.91
"""Of a 95% interval in 500 simulations; 0.95 less four standard errors. Cells near 0 and 1 are discrete and lie above."""


def shares(seed, num, mean, correlation):
    """(num,) true shares of clusters around a mean, with the given correlation inside a cluster."""
    generator = np.random.default_rng(seed)
    if correlation == 0:
        return np.full(num, mean)
    spread = (1 - correlation) / correlation
    return generator.beta(mean * spread, (1 - mean) * spread, num)


def coverage(intervals, truth):
    return float(np.mean([interval.low <= truth <= interval.high for interval in intervals]))


@given(st.integers(1, 500).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))))
def test_a_rate_has_the_wilson_interval(counts):
    hits, n = counts
    got = rate(hits, n)
    expected = binomtest(hits, n).proportion_ci(method="wilson")
    assert got.value == hits / n
    assert got.low == pytest.approx(expected.low, abs=1e-9)
    assert got.high == pytest.approx(expected.high, abs=1e-9)


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


@pytest.mark.parametrize("value", [True, False])
def test_a_unanimous_sample_still_has_a_width_that_clusters_make_wider(value):
    alone = clustered_rate([value] * 40, range(40))
    together = clustered_rate([value] * 40, [index // 4 for index in range(40)])
    assert 0.05 < alone.high - alone.low < together.high - together.low < 0.5
    difference = paired_difference(np.full(40, value), np.full(40, value))
    assert difference.low < 0 == difference.value < difference.high


def test_the_paired_difference_is_newcombes_of_the_published_example():
    # Airway responsiveness before and after transplantation (Bentur et al. 2009); interval of method 10 as given by
    # Fagerland, Lydersen & Laake (2014), table 6: -0.507 to -0.026.
    after = np.repeat([True, True, False, False], [1, 1, 7, 12])
    before = np.repeat([True, False, True, False], [1, 1, 7, 12])
    got = paired_difference(before, after)
    assert (got.value, got.low, got.high) == pytest.approx((-6 / 21, -0.507, -0.026), abs=5e-4)


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


def test_few_examples_give_the_paired_t_interval():
    generator = np.random.default_rng(1)
    before, after = generator.normal(size=(2, 7))
    expected = ttest_rel(after, before).confidence_interval()
    got = paired_difference(before, after)
    assert (got.low, got.high) == pytest.approx((expected.low, expected.high))


def test_the_same_seed_gives_the_same_interval():
    values = np.random.default_rng(2).exponential(size=30)
    assert clustered_mean(values, seed=5) == clustered_mean(values, seed=5) != clustered_mean(values, seed=6)


def test_lengths_that_differ_are_refused():
    with pytest.raises(ValueError, match="two equal lengths"):
        paired_difference(np.array([True]), np.array([True, False]))


@pytest.mark.slow
@pytest.mark.parametrize("correlation", [0.0, 0.3])
@pytest.mark.parametrize("share", [0.04, 0.3, 0.9])
def test_the_clustered_rate_covers_the_true_rate(share, correlation):
    generator = np.random.default_rng(3)
    clusters = np.repeat(np.arange(24), 4)
    samples = (generator.random((24, 4)) < shares(seed, 24, share, correlation)[:, None] for seed in range(500))
    assert coverage([clustered_rate(sample.ravel(), clusters) for sample in samples], share) >= LEAST_COVERAGE


@pytest.mark.slow
@pytest.mark.parametrize(("num", "size"), [(24, 1), (96, 1), (24, 4)])
@pytest.mark.parametrize(("before", "after"), [(0.05, 0.9), (0.1, 0.15), (0.5, 0.6)])
def test_the_paired_difference_covers_the_true_change(num, size, before, after):
    generator = np.random.default_rng(4)
    clusters = np.repeat(np.arange(num), size)
    intervals = []
    for seed in range(500):
        # Half of the examples keep their luck from before to after, and a cluster shares some of it.
        luck = generator.random((2, num, size))
        luck[1] = np.where(generator.random((num, size)) < 0.5, luck[0], luck[1])
        correlation = 0.0 if size == 1 else 0.3
        true = [
            shares(seed + 10_000 * when, num, mean, correlation)[:, None] for when, mean in ((1, before), (2, after))
        ]
        first, second = ((drawn < share).ravel() for drawn, share in zip(luck, true, strict=True))
        intervals.append(paired_difference(first, second, clusters=clusters))
    assert coverage(intervals, after - before) >= LEAST_COVERAGE


@pytest.mark.slow
def test_the_mean_interval_covers_the_mean_of_skewed_losses_better_than_a_t_interval():
    generator = np.random.default_rng(5)
    samples = generator.lognormal(0, 1, (500, 60))
    truth = math.exp(0.5)
    covered = coverage([clustered_mean(sample, seed=n) for n, sample in enumerate(samples)], truth)
    half = 2.0 * samples.std(axis=1, ddof=1) / math.sqrt(60)
    assert covered >= LEAST_COVERAGE
    assert covered >= np.mean(np.abs(samples.mean(axis=1) - truth) <= half) + 0.015


@pytest.mark.slow
def test_the_mean_interval_covers_the_mean_of_clusters_of_unequal_size():
    generator = np.random.default_rng(6)
    clusters = np.repeat(np.arange(30), np.arange(30) % 5 + 1)
    intervals = []
    for seed in range(300):
        values = generator.normal(size=30)[clusters] + generator.normal(size=len(clusters))
        intervals.append(clustered_mean(values, clusters=clusters, seed=seed))
    assert coverage(intervals, 0.0) >= LEAST_COVERAGE
