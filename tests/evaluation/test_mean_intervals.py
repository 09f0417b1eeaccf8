"""Intervals of means: Student's for few examples, and coverage for skewed and clustered losses."""

import math

import numpy as np
import pytest
from interval_coverage import LEAST_COVERAGE, coverage
from scipy.stats import ttest_rel

from moe_ray.evaluation.intervals import clustered_mean, paired_difference


def test_few_examples_give_the_paired_t_interval():
    generator = np.random.default_rng(1)
    before, after = generator.normal(size=(2, 7))
    expected = ttest_rel(after, before).confidence_interval()
    got = paired_difference(before, after)
    assert (got.low, got.high) == pytest.approx((expected.low, expected.high))


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
