"""p-values are exact, corrected ones hold their level, intervals and stability mean what they say."""

from __future__ import annotations

from fractions import Fraction
from itertools import combinations, product

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_ray.experts import Expert
from moe_ray.identification.permutation_test import Samples, permutation_test
from moe_ray.identification.risk import ExampleCounts, example_counts
from moe_ray.identification.significance import cluster_interval, q_values, selection_stability, smallest_effect
from moe_ray.testing.simulated_counts import Population, simulate

ROUNDING = 1e-12


def samples_of(batch: ExampleCounts, pairs: npt.NDArray[np.object_] | None = None) -> Samples:
    return Samples.of(batch.counts_NX, batch.tokens_N, batch.is_unsafe_N, pairs)


def a_batch(*, seed: int = 0, each: int = 8, planted: tuple[Expert, ...] = (), shift: float = 0.0) -> Samples:
    counts = simulate(Population(), safe_per_batch=each, unsafe_per_batch=each, planted=planted, shift=shift, seed=seed)
    return samples_of(next(example_counts(counts)))


def exact_p(samples: Samples, choices: list[set[int]], clusters: list[list[int]]) -> tuple[list[float], list[float]]:
    """One-sided p and maxT-adjusted p of each expert in rational arithmetic, over the given sets of unsafe examples.

    The statistic is difference / standard error; its sign and square are rational.
    """
    sizes = [int(size) for size in samples.sizes_N]

    def signed_square(values: list[int], unsafe: set[int]) -> Fraction:
        total = {True: sum(sizes[i] for i in unsafe), False: sum(sizes) - sum(sizes[i] for i in unsafe)}
        rate = Fraction(sum(values), sum(sizes))
        parts = [
            sum((values[i] - rate * sizes[i]) / (total[True] if i in unsafe else -total[False]) for i in cluster)
            for cluster in clusters
        ]
        difference, variance = sum(parts), sum(part**2 for part in parts)
        return difference * abs(difference) / variance if variance else Fraction(0)

    columns = [[int(value) for value in column] for column in samples.values_NX.T]
    observed_set = set(np.flatnonzero(samples.is_unsafe_N).tolist())
    table = [[signed_square(values, chosen) for values in columns] for chosen in choices]
    p, p_maxt = [], []
    for expert, values in enumerate(columns):
        observed = signed_square(values, observed_set)
        p.append(sum(row[expert] >= observed for row in table) / len(choices))
        p_maxt.append(sum(max(row) >= observed for row in table) / len(choices))
    return p, p_maxt


@st.composite
def small_batches(draw: st.DrawFn) -> Samples:
    """Few prompts with few tokens, so that ties abound; the labels in any order."""
    is_unsafe = draw(
        st.lists(st.booleans(), min_size=4, max_size=7).filter(lambda labels: 0 < sum(labels) < len(labels))
    )
    sizes = draw(st.lists(st.integers(1, 6), min_size=len(is_unsafe), max_size=len(is_unsafe)))
    values = [[draw(st.integers(0, size)) for _ in range(3)] for size in sizes]
    return Samples.of(values, sizes, np.array(is_unsafe))


@given(small_batches())
@settings(deadline=None, max_examples=80)
def test_p_equals_counting_all_relabellings_in_exact_arithmetic(samples: Samples) -> None:
    num_unsafe = int(samples.is_unsafe_N.sum())
    choices = [set(chosen) for chosen in combinations(range(len(samples.sizes_N)), num_unsafe)]
    test = permutation_test(samples)
    assert test.is_exact
    p, p_maxt = exact_p(samples, choices, [[i] for i in range(len(samples.sizes_N))])
    np.testing.assert_allclose(test.p_X, p, atol=ROUNDING)
    np.testing.assert_allclose(test.p_maxt_X, p_maxt, atol=ROUNDING)


@given(st.integers(0, 10_000))
@settings(deadline=None, max_examples=25)
def test_p_of_pairs_equals_swapping_inside_pairs_only(seed: int) -> None:
    rng = np.random.default_rng(seed)
    order = rng.permutation(8)
    pairs, is_unsafe = np.repeat(np.array(list("abcd"), dtype=object), 2)[order], np.tile([True, False], 4)[order]
    sizes = rng.integers(1, 6, 8)
    samples = Samples.of(rng.integers(0, sizes[:, None] + 1, (8, 3)), sizes, is_unsafe, pairs)
    sides = [np.flatnonzero(pairs == pair).tolist() for pair in "abcd"]
    choices = [set(chosen) for chosen in product(*sides)]
    p, p_maxt = exact_p(samples, choices, sides)
    test = permutation_test(samples)
    np.testing.assert_allclose(test.p_X, p, atol=ROUNDING)
    np.testing.assert_allclose(test.p_maxt_X, p_maxt, atol=ROUNDING)


@given(st.integers(0, 10_000))
@settings(deadline=None, max_examples=15)
def test_p_never_is_zero_and_correction_never_lowers_it(seed: int) -> None:
    samples = a_batch(seed=seed)
    for test in (permutation_test(samples), permutation_test(samples, limit=500)):
        num = len(test.maxima_P)
        assert (test.p_X >= 1 / num).all()
        assert (test.p_maxt_X >= test.p_X - ROUNDING).all()
        assert (q_values(test.p_X) >= test.p_X - ROUNDING).all()


def test_order_of_examples_and_experts_changes_no_p() -> None:
    samples, rng = a_batch(seed=1), np.random.default_rng(0)
    rows, columns = rng.permutation(16), rng.permutation(64)
    moved = Samples.of(samples.values_NX[rows][:, columns], samples.sizes_N[rows], samples.is_unsafe_N[rows])
    there, back = permutation_test(samples), permutation_test(moved)
    np.testing.assert_array_equal(back.p_X, there.p_X[columns])
    np.testing.assert_array_equal(back.p_maxt_X, there.p_maxt_X[columns])


def test_equal_prompts_with_exchanged_labels_have_exactly_tied_values() -> None:
    values = np.tile([[0, 3], [7, 2], [1, 3], [5, 5]], (4, 1))
    test = permutation_test(Samples.of(values, np.full(16, 10), np.repeat([True, False], 8)))
    # The difference is 0: 12,870 relabellings less those strictly below 0, which are as many as those strictly above.
    assert (test.p_X > 0.5).all()


def test_drawn_relabellings_come_near_all_of_them() -> None:
    samples = a_batch(seed=3)
    exact, drawn = permutation_test(samples), permutation_test(samples, limit=4000)
    assert exact.is_exact
    assert not drawn.is_exact
    np.testing.assert_allclose(drawn.p_X, exact.p_X, atol=0.04)  # 5 standard errors of 4000 draws


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


def share_with_a_false_alarm(num_batches: int, *, seed: int, population: Population) -> float:
    counts = simulate(population, num_batches=num_batches, seed=seed)
    alarms = [permutation_test(samples_of(b)).p_maxt_X.min() <= 0.05 for b in example_counts(counts)]
    return float(np.mean(alarms))


def test_null_batches_pass_maxt_at_five_percent_or_less() -> None:
    assert share_with_a_false_alarm(200, seed=0, population=Population()) <= 0.07


def test_null_batches_with_longer_unsafe_prompts_pass_no_more_often() -> None:
    # Labels are not strictly exchangeable then; a statistic that is not studentised alarms in 17% of these batches.
    long = Population(unsafe_tokens=(60, 200))
    assert share_with_a_false_alarm(100, seed=1, population=long) <= 0.1  # 5% and two standard errors


def test_smallest_effect_is_where_the_corrected_p_crosses_five_percent() -> None:
    samples = a_batch(seed=2)
    test = permutation_test(samples)
    effect = smallest_effect(samples, test)
    bar = test.maxima_P[-int(0.05 * len(test.maxima_P))]
    for expert in (0, 20, 40):
        for factor, is_certain in ((1.001, True), (0.999, False)):
            shift = (factor * effect[expert] - samples.difference()[expert]) * samples.sizes_N * samples.is_unsafe_N
            values = samples.values_NX[:, expert] + shift
            centred = values - samples.sizes_N * values.sum() / samples.sizes_N.sum()
            totals = np.where(samples.is_unsafe_N, 1, -1) * [
                samples.sizes_N[samples.is_unsafe_N == label].sum() for label in samples.is_unsafe_N
            ]
            statistic = (centred / totals).sum() / np.sqrt(np.square(centred / totals).sum())
            assert (statistic > bar) == is_certain


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
