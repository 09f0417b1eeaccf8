"""Intervals of rates: the published formulas, and the coverage that they promise for clusters too."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from interval_coverage import LEAST_COVERAGE, coverage
from scipy.stats import binomtest

from moe_ray.evaluation.intervals import clustered_rate, paired_difference, rate


def shares(seed, num, mean, correlation):
    """(num,) true shares of clusters around a mean, with the given correlation inside a cluster."""
    generator = np.random.default_rng(seed)
    if correlation == 0:
        return np.full(num, mean)
    spread = (1 - correlation) / correlation
    return generator.beta(mean * spread, (1 - mean) * spread, num)


@given(st.integers(1, 500).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))))
def test_a_rate_has_the_wilson_interval(counts):
    hits, n = counts
    got = rate(hits, n)
    expected = binomtest(hits, n).proportion_ci(method="wilson")
    assert got.value == hits / n
    assert got.low == pytest.approx(expected.low, abs=1e-9)
    assert got.high == pytest.approx(expected.high, abs=1e-9)


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
