"""Intervals, stability, false discovery rate and power mean what they say."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from simulated_samples import ROUNDING, a_batch, samples_of

from moe_ray.experts import Expert
from moe_ray.identification.permutation_test import permutation_test
from moe_ray.identification.risk import example_counts
from moe_ray.identification.samples import Samples
from moe_ray.identification.significance import cluster_interval, q_values, selection_stability, smallest_effect
from moe_ray.testing.simulated_counts import Population, simulate


@given(st.lists(st.floats(0.001, 1.0), min_size=1, max_size=30))
@settings(max_examples=50)
def test_q_is_never_below_p_and_keeps_its_order(p: list[float]) -> None:
    q = q_values(np.array(p))
    assert (q >= np.array(p) - ROUNDING).all()
    assert (np.diff(q[np.argsort(p)]) >= -ROUNDING).all()


def test_q_by_hand() -> None:
    # 4 tests: 0.01 * 4 / 1, 0.02 * 4 / 2, 0.03 * 4 / 3 and 0.5; each is the least of its own and all later ones.
    assert q_values(np.array([0.5, 0.02, 0.01, 0.03])).tolist() == pytest.approx([0.5, 0.04, 0.04, 0.04])


def test_an_expert_that_no_token_uses_is_not_tested() -> None:
    samples = a_batch()
    values = samples.values_NX.copy()
    values[:, 5] = 0
    silent = Samples.of(values, samples.sizes_N, samples.is_unsafe_N)
    test = permutation_test(silent)
    assert test.p_X[5] == test.p_maxt_X[5] == 1
    assert np.isnan(smallest_effect(silent, test)[5])


def test_a_strong_shift_is_certain_and_stable() -> None:
    samples = a_batch(planted=(Expert(1, 3),), shift=0.7)
    test = permutation_test(samples)
    position = 16 + 3
    assert test.p_maxt_X[position] <= 0.01
    assert selection_stability(samples, threshold=0.05, top_k=5)[position] == 1
    low, high = cluster_interval(samples)
    assert 0 < low[position] < samples.difference()[position] < high[position]


def test_smallest_effect_is_where_the_corrected_p_crosses_five_percent() -> None:
    samples = a_batch(seed=2)
    test = permutation_test(samples)
    effect = smallest_effect(samples, test)
    bar = test.maxima_P[-int(0.05 * len(test.maxima_P))]
    for expert in (0, 20, 40):
        for factor, is_certain in ((1.001, True), (0.999, False)):
            shift = (factor * effect[expert] - samples.difference()[expert]) * samples.sizes_N * samples.is_unsafe_N
            values = samples.values_NX[:, expert] + shift
            rates, variance = [], 0.0
            for rows in (samples.is_unsafe_N, ~samples.is_unsafe_N):
                total = samples.sizes_N[rows].sum()
                rates.append(values[rows].sum() / total)
                residuals = values[rows] - samples.sizes_N[rows] * rates[-1]
                variance += 8 / 7 * np.square(residuals / total).sum()
            assert ((rates[0] - rates[1]) / np.sqrt(variance) > bar) == is_certain


def test_one_prompt_of_a_label_leaves_the_interval_open() -> None:
    samples = Samples.of([[1], [2], [3]], [4, 4, 4], np.array([True, False, False]))
    low, high = cluster_interval(samples)
    assert (low[0], high[0]) == (-1, 1)


def test_interval_by_hand_equals_welch_on_prompts_of_equal_length() -> None:
    unsafe, safe = [6, 7, 9, 6], [3, 5, 2, 4]
    samples = Samples.of(np.array([unsafe + safe]).T, np.full(8, 10), np.repeat([True, False], 4))
    # By hand: variances 2 and 5/3 (in tokens squared), standard error sqrt((2 + 5/3) / 4) / 10, Welch's 5.951 degrees.
    low, high = cluster_interval(samples)
    assert (low[0] + high[0]) / 2 == pytest.approx(0.35)
    assert (high[0] - low[0]) / 2 == pytest.approx(2.4518 * 0.0957427, rel=1e-3)


def test_interval_of_pairs_is_that_of_the_paired_differences() -> None:
    pairs = np.array(list("abcdabcd"), dtype=object)
    samples = Samples.of(np.array([[6, 7, 9, 6, 3, 5, 6, 4]]).T, np.full(8, 10), np.repeat([True, False], 4), pairs)
    low, high = cluster_interval(samples)
    # Differences 3, 2, 3, 2: standard error sqrt(1/3) / 2 / 10, t of 3 degrees 3.18245.
    assert (high[0] - low[0]) / 2 == pytest.approx(3.18245 * np.sqrt(1 / 3) / 20, rel=1e-4)


@pytest.mark.slow
def test_interval_covers_the_true_difference_nearly_as_often_as_it_says() -> None:
    counts = simulate(Population(), num_batches=300, planted=(Expert(0, 1),), shift=0.2, seed=4)
    covered = []
    for batch in example_counts(counts):
        low, high = cluster_interval(samples_of(batch))
        covered.append((low[32:] <= 0) & (high[32:] >= 0))
    assert 0.92 <= np.mean(covered) <= 0.97


def test_stability_is_a_share_and_respects_top_k() -> None:
    samples = a_batch(seed=5)
    few = selection_stability(samples, threshold=0.0, top_k=3, resamples=100)
    many = selection_stability(samples, threshold=0.0, top_k=30, resamples=100)
    assert few.sum() == pytest.approx(3)
    assert (few <= many).all()
    assert many.max() <= 1


def test_stability_breaks_ties_at_the_last_place_by_layer_and_expert() -> None:
    # Four experts with the same counts tie in every resample, and only two may be selected: always the first two.
    values = np.tile(np.array([[9, 8, 7, 1, 2, 3]]).T, (1, 4))
    samples = Samples.of(values, np.array([13, 11, 17, 13, 11, 17]), np.repeat([True, False], 3))
    assert selection_stability(samples, threshold=0.0, top_k=2, resamples=50).tolist() == [1, 1, 0, 0]


def test_pairs_are_resampled_as_pairs() -> None:
    pairs = np.array(list("abcdabcd"), dtype=object)
    values = np.array([[9, 8, 3, 4, 7, 6, 1, 2]]).T
    samples = Samples.of(values, np.full(8, 10), np.repeat([True, False], 4), pairs)
    # Every pair differs by exactly 0.2, so every resample of pairs does too.
    assert selection_stability(samples, threshold=0.19, top_k=1)[0] == 1
    unpaired = Samples.of(values, np.full(8, 10), np.repeat([True, False], 4))
    assert selection_stability(unpaired, threshold=0.19, top_k=1)[0] < 1
