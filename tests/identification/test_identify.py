"""A batch's risk table says how sure each number is, and depends on that batch only."""

from __future__ import annotations

import time
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest

from moe_ray.config.identify import IdentifyConfig
from moe_ray.errors import InputError
from moe_ray.experts import Expert
from moe_ray.identification.identify import CERTAINTY_COLUMNS, certainty_per_batch, identify
from moe_ray.identification.selection import select
from moe_ray.routing.counts import RoutingCounts
from moe_ray.testing.simulated_counts import Population, simulate

RISK_COLUMNS = (
    "batch_idx", "layer", "expert", "a_safe", "d_safe", "a_unsafe", "d_unsafe", "a_safe_n", "a_unsafe_n", "risk_diff",
)  # fmt: skip

PLANTED = (Expert(0, 2), Expert(2, 9))


def with_weights(counts: RoutingCounts) -> RoutingCounts:
    """Counts that also hold routed weights: twice the tokens of even experts, once those of odd ones."""
    weights_NLE = counts.counts_NLE * np.where(np.arange(counts.counts_NLE.shape[2]) % 2, 1.0, 2.0)
    return replace(counts, weights_NLE=weights_NLE.astype(np.float32))


def planted_counts(num_batches: int = 3) -> RoutingCounts:
    return simulate(Population(), num_batches=num_batches, planted=PLANTED, shift=0.6)


def test_the_table_has_the_designs_columns_and_the_statistics() -> None:
    counts = planted_counts()
    risk = identify(counts, IdentifyConfig())
    assert tuple(risk.columns) == (*RISK_COLUMNS, "risk_diff_prompt", *CERTAINTY_COLUMNS)
    assert risk[list(CERTAINTY_COLUMNS)].notna().all().all()


def test_a_batch_alone_gives_its_rows_of_the_whole_table() -> None:
    counts, selection = planted_counts(), IdentifyConfig(permutations=2000)
    whole = identify(counts, selection, seed=5)
    for batch in (2, 0, 1):
        rows = np.random.default_rng(batch).permutation(np.flatnonzero(counts.batch_idx == batch))
        alone = identify(counts.take(rows), selection, seed=5)
        pd.testing.assert_frame_equal(alone, whole[whole["batch_idx"] == batch].reset_index(drop=True))


def test_equal_weight_per_prompt_is_the_mean_of_the_prompts_rates() -> None:
    counts = planted_counts(1)
    rates = counts.counts_NLE / counts.num_tokens[:, None, None]
    expected = rates[counts.label == "unsafe"].mean(axis=0) - rates[counts.label == "safe"].mean(axis=0)
    risk = identify(counts, IdentifyConfig(weighting="prompts", permutations=0, resamples=0))
    np.testing.assert_allclose(risk["risk_diff_prompt"], expected.ravel(), atol=1e-12)
    assert risk["p"].isna().all()
    assert risk["stability"].isna().all()


def test_activation_weighting_uses_routed_weights() -> None:
    counts = planted_counts(1)
    risk = identify(with_weights(counts), IdentifyConfig(weighting="activation"))
    factor = np.where(risk["expert"] % 2, 1.0, 2.0)
    np.testing.assert_allclose(risk["risk_diff_activation"], factor * risk["risk_diff"], atol=1e-12)
    np.testing.assert_allclose(risk["w_unsafe"], factor * risk["a_unsafe"])
    plain = identify(counts, IdentifyConfig())
    np.testing.assert_array_equal(risk["p"], plain["p"])


def test_activation_weighting_without_weights_is_an_error() -> None:
    with pytest.raises(InputError, match="hold no routed weights"):
        identify(planted_counts(1), IdentifyConfig(weighting="activation"))


def test_pairs_restrict_the_relabellings() -> None:
    counts = planted_counts(1)
    pairs = np.array([f"pair {i % 8}" for i in range(16)], dtype=object)
    paired = identify(replace(counts, pair=pairs), IdentifyConfig())
    assert paired["p"].min() >= 1 / 256
    np.testing.assert_allclose(paired["p"] * 256, np.round(paired["p"] * 256), atol=1e-9)
    assert identify(counts, IdentifyConfig())["p"].min() < 1 / 256


def test_a_clear_batch_is_significant_and_an_empty_one_is_not() -> None:
    selection = IdentifyConfig()
    for counts, is_clear in ((planted_counts(), True), (simulate(Population(), num_batches=3, seed=3), False)):
        risk = identify(counts, selection)
        certainty = certainty_per_batch(risk, select(risk, selection), selection)
        assert (certainty["is_significant"] == is_clear).all()
        assert ((certainty["num_significant"] > 0) == is_clear).all()
        assert certainty["certifiable"].between(0, 1).all()


def test_without_relabellings_and_resamples_certainty_is_unknown() -> None:
    selection = IdentifyConfig(permutations=0, resamples=0)
    risk = identify(planted_counts(), selection)
    certainty = certainty_per_batch(risk, select(risk, selection), selection)
    assert certainty["is_significant"].isna().all()
    assert certainty["median_stability"].isna().all()


def test_more_prompts_certify_smaller_effects() -> None:
    sizes = [
        identify(simulate(Population(), safe_per_batch=n, unsafe_per_batch=n), IdentifyConfig())["certifiable"].median()
        for n in (8, 16, 48)
    ]
    assert sizes[0] > sizes[1] > sizes[2]


def test_alpha_filters_what_the_plain_rule_selects() -> None:
    risk = identify(planted_counts(), IdentifyConfig())
    plain, sure = select(risk, IdentifyConfig()), select(risk, IdentifyConfig(alpha=0.05))
    for batch in (0, 1, 2):
        assert set(PLANTED) <= set(sure.selected[batch]) <= set(plain.selected[batch])
        assert len(sure.selected[batch]) < len(plain.selected[batch])


@pytest.mark.slow
def test_statistics_of_a_default_run_take_less_than_two_seconds() -> None:
    counts = simulate(Population(), num_batches=36)
    identify(counts.take(counts.batch_idx == 0), IdentifyConfig())
    started = time.process_time()
    identify(counts, IdentifyConfig())
    assert time.process_time() - started < 2


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"alpha": 0.05, "permutations": 0}, "identify.permutations: got 0"),
        ({"stability": 0.5, "resamples": 0}, "identify.resamples: got 0"),
        ({"alpha": 0.05, "rule": "esft_token"}, "identify.rule: got 'esft_token'"),
        ({"top_p": 0.0}, "identify.top_p: got 0.0"),
        ({"alpha": 1.0}, "identify.alpha: got 1.0"),
        ({"stability": 1.5}, "identify.stability: got 1.5"),
        ({"per_layer_quota": 0}, "identify.per_layer_quota: got 0"),
    ],
)
def test_settings_that_make_no_sense_are_errors(setting: dict[str, object], message: str) -> None:
    with pytest.raises(InputError, match=message):
        replace(IdentifyConfig(), **setting)
