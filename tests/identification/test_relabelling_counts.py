"""Counts are those of double precision, whether numpy or the compiled kernel takes the first look."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_ray.identification import relabelling_counts
from moe_ray.identification.relabelling_counts import RelabellingCounts, count_relabellings, one_blas_thread
from moe_ray.identification.relabelling_library import library
from moe_ray.identification.relabellings import Relabellings, canonical_order, relabellings
from moe_ray.identification.samples import Samples
from moe_ray.identification.studentised import Studentised, studentised

ROUNDING = 1e-12


def prepared(samples: Samples, limit: int = 20_000) -> tuple[Studentised, Relabellings]:
    order, strata = canonical_order(samples.is_unsafe_N, samples.groups_N)
    labels = relabellings(strata, limit, 0)
    return studentised(samples, labels, order), labels


def in_double(statistic: Studentised, labels: Relabellings) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float64]]:
    """Hits and maxima of every value in double precision."""
    values_XP = statistic.values()
    if labels.is_mirrored:
        values_XP = np.hstack([values_XP, -values_XP])
    return (values_XP >= values_XP[:, :1] - 1e-9).sum(axis=1), values_XP.max(axis=0)


def both_ways(statistic: Studentised, labels: Relabellings) -> list[RelabellingCounts]:
    return [count_relabellings(statistic, labels, compiled=compiled) for compiled in (True, False)]


@st.composite
def batches(draw: st.DrawFn) -> tuple[Samples, int]:
    """Few tokens make ties, many make none; some experts no token uses, and some all prompts use alike."""
    safe, unsafe = draw(st.sampled_from([(8, 8), (6, 6), (10, 4), (3, 9), (1, 5), (12, 12), (20, 7), (2, 2)]))
    rng = np.random.default_rng(draw(st.integers(0, 10_000)))
    longest = draw(st.sampled_from([1, 3, 40, 3000]))
    sizes = rng.integers(1, longest + 1, safe + unsafe) if draw(st.booleans()) else np.full(safe + unsafe, longest)
    values = rng.binomial(sizes[:, None], rng.beta(0.3, 2, 40))
    values[:, 0], values[:, 1], values[:, 2] = 0, sizes, values[:, 3]
    is_unsafe = rng.permutation(np.arange(safe + unsafe) < unsafe)
    return Samples.of(values, sizes, is_unsafe), draw(st.sampled_from([20_000, 300]))


@pytest.mark.slow
@given(batches())
@settings(max_examples=30)
def test_both_ways_count_what_double_precision_counts(batch: tuple[Samples, int]) -> None:
    statistic, labels = prepared(*batch)
    hits_X, maxima_P = in_double(statistic, labels)
    for counts in both_ways(statistic, labels):
        np.testing.assert_array_equal(counts.hits_X, hits_X)
        np.testing.assert_allclose(counts.maxima_P, maxima_P, atol=1e-10)


def test_pairs_and_extreme_lengths_are_counted_in_double() -> None:
    rng = np.random.default_rng(0)
    sizes = np.array([1, 1, 1, 1, 1, 1, 1, 200_000])
    extreme = Samples.of(rng.binomial(sizes[:, None], 0.3, (8, 20)), sizes, np.arange(8) >= 4)
    pairs = np.array(list("abcdabcd"), dtype=object)
    paired = Samples.of(rng.binomial(9, 0.3, (8, 20)), np.full(8, 9), np.arange(8) >= 4, pairs)
    assert prepared(extreme)[0].bound_of_rounding > 0.02
    for samples in (extreme, paired):
        statistic, labels = prepared(samples)
        hits_X, maxima_P = in_double(statistic, labels)
        for counts in both_ways(statistic, labels):
            np.testing.assert_array_equal(counts.hits_X, hits_X)
            np.testing.assert_array_equal(counts.maxima_P, maxima_P)


def test_single_precision_stays_within_its_bound() -> None:
    rng = np.random.default_rng(1)
    for longest in (2, 50, 400):
        sizes = rng.integers(1, longest + 1, 16)
        statistic, _ = prepared(Samples.of(rng.binomial(sizes[:, None], 0.2, (16, 50)), sizes, np.arange(16) >= 8))
        rows, factors = statistic.in_single_precision(statistic.num_columns)
        difference, within, mixed = (left @ right for left, right in zip(rows, factors, strict=True))
        r = difference / np.sqrt(within + difference * (mixed + difference * statistic.curve_P.astype(np.float32)))
        assert np.abs(r - statistic.values()).max() < statistic.bound_of_rounding / 2


def test_more_ties_than_are_noted_are_counted_all_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    # Every prompt has one token, so that relabellings tie by the thousand, and so do experts with each other.
    values = np.random.default_rng(2).integers(0, 2, (16, 300))
    statistic, labels = prepared(Samples.of(values, np.ones(16), np.arange(16) >= 8))
    hits_X, maxima_P = in_double(statistic, labels)
    for counts in both_ways(statistic, labels):
        np.testing.assert_array_equal(counts.hits_X, hits_X)
        np.testing.assert_allclose(counts.maxima_P, maxima_P, atol=1e-10)


def test_products_run_in_the_calling_thread() -> None:
    controller = relabelling_counts._threadpools()
    with one_blas_thread():
        assert {pool["num_threads"] for pool in controller.info() if pool["user_api"] == "blas"} <= {1}


@pytest.mark.skipif(library() is None, reason="no C compiler")
def test_the_kernel_is_used_where_it_serves(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_sweep(*arguments: object) -> None:
        raise AssertionError("numpy took the first look")

    monkeypatch.setattr(relabelling_counts, "_sweep", no_sweep)
    sizes = np.random.default_rng(3).integers(5, 50, 16)
    samples = Samples.of(np.random.default_rng(4).binomial(sizes[:, None], 0.2, (16, 10)), sizes, np.arange(16) >= 8)
    for limit in (20_000, 500):
        count_relabellings(*prepared(samples, limit))
    with pytest.raises(AssertionError, match="numpy took the first look"):
        count_relabellings(*prepared(samples), compiled=False)
