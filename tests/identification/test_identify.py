"""A batch's risk table says how sure each number is, and depends on that batch only."""

from __future__ import annotations

import time
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
from prompt_tokens import by_prompt_tokens

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
    risk = identify(counts, by_prompt_tokens())
    assert tuple(risk.columns) == (*RISK_COLUMNS, "risk_diff_prompt", *CERTAINTY_COLUMNS)
    assert risk[list(CERTAINTY_COLUMNS)].notna().all().all()


def test_a_batch_alone_gives_its_rows_of_the_whole_table() -> None:
    counts, selection = planted_counts(), by_prompt_tokens(permutations=2000)
    whole = identify(counts, selection, seed=5)
    for batch in (2, 0, 1):
        rows = np.random.default_rng(batch).permutation(np.flatnonzero(counts.batch_idx == batch))
        alone = identify(counts.take(rows), selection, seed=5)
        pd.testing.assert_frame_equal(alone, whole[whole["batch_idx"] == batch].reset_index(drop=True))


def test_equal_weight_per_prompt_is_the_mean_of_the_prompts_rates() -> None:
    counts = planted_counts(1)
    rates = counts.counts_NLE / counts.num_tokens[:, None, None]
    expected = rates[counts.label == "unsafe"].mean(axis=0) - rates[counts.label == "safe"].mean(axis=0)
    risk = identify(counts, by_prompt_tokens(weighting="prompts", permutations=0, resamples=0))
    np.testing.assert_allclose(risk["risk_diff_prompt"], expected.ravel(), atol=1e-12)
    assert risk["p"].isna().all()
    assert risk["stability"].isna().all()


def test_activation_weighting_shares_a_layers_tokens_out_by_routed_weight() -> None:
    counts = planted_counts(1)
    weighted = with_weights(counts)
    risk = identify(weighted, by_prompt_tokens(weighting="activation"))
    share_NLE = weighted.weights_NLE / weighted.weights_NLE.sum(axis=2, keepdims=True)
    tokens_NLE = share_NLE * counts.counts_NLE.sum(axis=2, keepdims=True)
    rates = [
        tokens_NLE[counts.label == label].sum(axis=0) / counts.num_tokens[counts.label == label].sum()
        for label in ("unsafe", "safe")
    ]
    np.testing.assert_allclose(risk["risk_diff_activation"], (rates[0] - rates[1]).ravel(), atol=1e-6)
    np.testing.assert_allclose(risk.groupby("layer")["risk_diff_activation"].sum(), 0, atol=1e-6)
    np.testing.assert_allclose(risk["w_unsafe"], np.where(risk["expert"] % 2, 1.0, 2.0) * risk["a_unsafe"])


@pytest.mark.parametrize("weight", [1 / 12, 1.0, 16.0])
def test_equal_weights_of_any_size_are_plain_rates_with_the_same_certainty(weight) -> None:
    counts = planted_counts(1)
    weights_NLE = (weight * counts.counts_NLE).astype(np.float32)
    risk = identify(replace(counts, weights_NLE=weights_NLE), by_prompt_tokens(weighting="activation"))
    plain = identify(counts, by_prompt_tokens())
    np.testing.assert_allclose(risk["risk_diff_activation"], plain["risk_diff"], atol=1e-6)
    np.testing.assert_allclose(risk["p_maxt"], plain["p_maxt"], atol=2e-3)
    assert select(risk, by_prompt_tokens(weighting="activation")).selected == select(plain, by_prompt_tokens()).selected


def test_what_scales_a_prompts_weights_changes_nothing() -> None:
    counts = with_weights(planted_counts(1))
    scale_N = np.random.default_rng(0).uniform(0.5, 20, len(counts.batch_idx)).astype(np.float32)
    scaled = replace(counts, weights_NLE=counts.weights_NLE * scale_N[:, None, None])
    found = [identify(each, by_prompt_tokens(weighting="activation")) for each in (counts, scaled)]
    np.testing.assert_allclose(found[0]["risk_diff_activation"], found[1]["risk_diff_activation"], atol=1e-6)


def test_an_expert_that_takes_all_weight_counts_for_all_experts_of_a_token() -> None:
    counts = planted_counts(1)
    weights_NLE = np.zeros(counts.counts_NLE.shape, dtype=np.float32)
    weights_NLE[:, :, 0], weights_NLE[counts.label == "safe"] = 1.0, 0.0
    weights_NLE[counts.label == "safe", :, 1] = 1.0
    risk = identify(replace(counts, weights_NLE=weights_NLE), by_prompt_tokens(weighting="activation"))
    first = risk[risk["expert"] == 0]
    np.testing.assert_allclose(first["risk_diff_activation"], counts.num_experts_per_tok)
    np.testing.assert_allclose(first["ci_high"], counts.num_experts_per_tok)


def test_activation_weighting_without_weights_is_an_error() -> None:
    with pytest.raises(InputError, match="hold no routed weights"):
        identify(planted_counts(1), by_prompt_tokens(weighting="activation"))


def test_pairs_restrict_the_relabellings() -> None:
    counts = planted_counts(1)
    pairs = np.array([f"pair {i % 8}" for i in range(16)], dtype=object)
    paired = identify(replace(counts, pair=pairs), by_prompt_tokens())
    assert paired["p"].min() >= 1 / 256
    np.testing.assert_allclose(paired["p"] * 256, np.round(paired["p"] * 256), atol=1e-9)
    assert identify(counts, by_prompt_tokens())["p"].min() < 1 / 256


def test_a_clear_batch_is_significant_and_an_empty_one_is_not() -> None:
    selection = by_prompt_tokens()
    for counts, is_clear in ((planted_counts(), True), (simulate(Population(), num_batches=3, seed=3), False)):
        risk = identify(counts, selection)
        certainty = certainty_per_batch(risk, select(risk, selection), selection)
        assert (certainty["is_significant"] == is_clear).all()
        assert ((certainty["num_significant"] > 0) == is_clear).all()
        assert certainty["certifiable"].between(0, 1).all()


def test_without_relabellings_and_resamples_certainty_is_unknown() -> None:
    selection = by_prompt_tokens(permutations=0, resamples=0)
    risk = identify(planted_counts(), selection)
    certainty = certainty_per_batch(risk, select(risk, selection), selection)
    assert certainty["is_significant"].isna().all()
    assert certainty["median_stability"].isna().all()


@pytest.mark.slow
def test_more_prompts_certify_smaller_effects() -> None:
    sizes = [
        identify(simulate(Population(), safe_per_batch=n, unsafe_per_batch=n), by_prompt_tokens())[
            "certifiable"
        ].median()
        for n in (8, 16, 48)
    ]
    assert sizes[0] > sizes[1] > sizes[2]


def test_alpha_filters_what_the_plain_rule_selects() -> None:
    risk = identify(planted_counts(), by_prompt_tokens())
    plain, sure = select(risk, by_prompt_tokens()), select(risk, by_prompt_tokens(alpha=0.05))
    for batch in (0, 1, 2):
        assert set(PLANTED) <= set(sure.selected[batch]) <= set(plain.selected[batch])
        assert len(sure.selected[batch]) < len(plain.selected[batch])


@pytest.mark.slow
def test_statistics_of_a_default_run_take_less_than_two_seconds() -> None:
    counts = simulate(Population(), num_batches=36)
    identify(counts.take(counts.batch_idx == 0), by_prompt_tokens())
    started = time.process_time()
    identify(counts, by_prompt_tokens())
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
        replace(by_prompt_tokens(), **setting)
