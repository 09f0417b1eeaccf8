"""What the rules beyond routing counts compare: prompts are the unit, and a prompt is paired with its own refusal."""

from __future__ import annotations

from dataclasses import replace
from itertools import product

import numpy as np
import pytest
from answered_counts import PROMPTS, answered
from prompt_tokens import by_prompt_tokens

from moe_ray.errors import InputError
from moe_ray.identification.comparisons import COMPARISONS, captured_comparisons, compared, is_relative
from moe_ray.identification.identify import identify
from moe_ray.identification.risk import example_counts
from moe_ray.identification.selection import (
    RULES,
    bar_of,
    difference_column,
    ranking_column,
    select,
    select_batches,
)
from moe_ray.identification.significance import standard_error
from moe_ray.routing.counts import concat_counts

FEW = {"permutations": 2000, "resamples": 50}


def the_batch(counts, roles=("prompt",)):
    (batch,) = example_counts(counts, roles=roles)
    return batch


def of(counts, role, label):
    return (counts.role == role) & (counts.label == label)


@pytest.mark.parametrize("rule", ["attribution", "gate"])
def test_scores_of_answers_are_means_over_prompts_unsafe_minus_safe_whatever_roles_count(rule):
    counts = answered()
    scores = getattr(counts, f"{rule}_NLE").astype(np.float64)
    means = [scores[of(counts, "response", label)].mean(axis=0).ravel() for label in ("unsafe", "safe")]
    for roles in (("prompt",), ("response",), ("prompt", "response")):
        risk = identify(counts, by_prompt_tokens(rule=rule, roles=roles, **FEW))
        np.testing.assert_allclose(risk[f"{rule}_unsafe"], means[0])
        np.testing.assert_allclose(risk[f"{rule}_safe"], means[1])
        np.testing.assert_allclose(risk[f"{rule}_diff"], means[0] - means[1])


def test_saliency_is_the_mean_over_an_experts_own_tokens_and_nothing_where_it_has_none():
    counts = answered()
    with np.errstate(invalid="ignore", divide="ignore"):
        mean = np.nan_to_num(counts.reap_NLE / counts.counts_NLE, nan=0.0, posinf=0.0)
    risk = identify(counts, by_prompt_tokens(rule="reap", **FEW))
    expected = mean[of(counts, "prompt", "unsafe")].mean(axis=0) - mean[of(counts, "prompt", "safe")].mean(axis=0)
    np.testing.assert_allclose(risk["reap_diff"], expected.ravel(), rtol=1e-6)


def test_answers_are_compared_with_refusals_of_the_same_unsafe_prompts():
    counts = answered()
    rows = of(counts, "response", "unsafe")
    counts_of, refusals = counts.counts_NLE[rows], counts.refusal_NLE[rows]
    sizes, refusal_sizes = counts.num_tokens[rows], counts.refusal_tokens[rows]
    pooled = counts_of.sum(axis=0) / sizes.sum() - refusals.sum(axis=0) / refusal_sizes.sum()
    risk = identify(counts, by_prompt_tokens(rule="comply_refuse", **FEW))
    np.testing.assert_allclose(risk["comply_refuse_diff"], pooled.ravel(), atol=1e-12)
    means = (counts_of / sizes[:, None, None] - refusals / refusal_sizes[:, None, None]).mean(axis=0)
    risk = identify(counts, by_prompt_tokens(rule="comply_refuse", weighting="prompts", **FEW))
    np.testing.assert_allclose(risk["comply_refuse_diff"], means.ravel(), atol=1e-12)


@pytest.mark.parametrize("rule", ["comply_refuse", "gate_refuse"])
def test_relabelling_turns_the_sign_of_whole_prompts_and_all_turns_are_tried(rule):
    config = by_prompt_tokens(rule=rule, weighting="prompts", **FEW)
    counts = answered(3)
    samples = compared(the_batch(counts), config)
    assert len(samples.values_NX) == 2 * PROMPTS
    differences_MX = samples.values_NX[:PROMPTS] - samples.values_NX[PROMPTS:]
    turned = np.array(list(product([1, -1], repeat=PROMPTS)))

    def studentised(signs):
        signed_MX = differences_MX * np.array(signs)[:, None]
        return signed_MX.mean(axis=0) / (signed_MX.std(axis=0, ddof=1) / np.sqrt(PROMPTS))

    t_RX = np.array([studentised(signs) for signs in turned])
    observed_X = t_RX[0]
    risk = identify(counts, config)
    np.testing.assert_allclose(risk["p"], (t_RX >= observed_X - 1e-9).mean(axis=0))
    largest_R = t_RX.max(axis=1)
    np.testing.assert_allclose(risk["p_maxt"], [(largest_R >= t - 1e-9).mean() for t in observed_X])


@pytest.mark.parametrize("rule", COMPARISONS)
def test_intervals_and_stability_are_of_the_rules_own_comparison(rule):
    counts, config = answered(5, planted=4.0), by_prompt_tokens(rule=rule, threshold=0.0, **FEW)
    risk = identify(counts, config)
    difference = risk[difference_column(config)]
    assert ranking_column(config) == difference_column(config)
    assert ((risk["ci_low"] <= difference) & (difference <= risk["ci_high"])).all()
    np.testing.assert_allclose(difference - risk["ci_low"], risk["ci_high"] - difference, rtol=1e-6)
    error_X = standard_error(compared(the_batch(counts), config))
    assert ((risk["ci_high"] - risk["ci_low"]) / error_X).between(3.9, 8).all()  # twice Student's t
    chosen = select(risk, config)[0].ravel()
    assert risk.loc[chosen, "stability"].min() > 0.2
    if rule in ("attribution", "gate", "gate_refuse"):
        planted = risk.iloc[-1]
        assert planted["stability"] == 1
        assert planted["p_maxt"] < 0.05
        assert planted[difference_column(config)] == difference.max()


@pytest.mark.parametrize("rule", [rule for rule, comparison in COMPARISONS.items() if comparison.is_relative])
def test_the_unit_of_a_score_does_not_matter(rule):
    counts, config = answered(7, planted=1.0), by_prompt_tokens(rule=rule, **FEW)
    names = ("attribution_NLE", "gate_NLE", "gate_refusal_NLE", "reap_NLE")
    tiny = replace(counts, **{name: (getattr(counts, name) * np.float32(2.0**-40)) for name in names})
    risk, small = identify(counts, config), identify(tiny, config)
    for column in ("p", "p_maxt", "q", "stability"):
        np.testing.assert_array_equal(risk[column], small[column])
    for column in ("ci_low", "ci_high", "certifiable"):
        np.testing.assert_allclose(risk[column] * 2.0**-40, small[column])
    assert select(risk, config).digest() == select(small, config).digest()


def test_experts_above_a_share_of_the_largest_are_selected_and_the_bar_never_falls_below_0():
    counts, config = answered(9, planted=4.0), by_prompt_tokens(rule="attribution", min_share=0.5, **FEW)
    risk = identify(counts, config)
    assert [str(expert) for expert in select(risk, config).selected[0]] == ["L01_E02"]
    wide = select_batches(risk, replace(config, min_share=0.0))[0]
    assert len(wide) == (risk["attribution_diff"] > 0).sum()
    assert len(select_batches(risk, replace(config, min_share=0.0, top_k=2))[0]) == 2
    assert bar_of([-3.0, -1.0], config) == 0
    assert bar_of([-3.0, 4.0], config) == 2
    assert bar_of([-3.0, 4.0], by_prompt_tokens()) == 0.05
    assert not is_relative(by_prompt_tokens(rule="comply_refuse"))


def test_where_nothing_counts_more_on_unsafe_prompts_the_error_says_so():
    config = by_prompt_tokens(rule="attribution", **FEW)
    risk = identify(answered(), config)
    risk["attribution_diff"] = -np.abs(risk["attribution_diff"])
    with pytest.raises(InputError, match=r"has attribution_diff above 0; .* no expert counts more on unsafe prompts"):
        select(risk, config)


@pytest.mark.parametrize("rule", COMPARISONS)
def test_a_rule_whose_scores_were_not_captured_names_the_setting(rule):
    plain = {name: None for name in ("attribution_NLE", "gate_NLE", "reap_NLE", "refusal_NLE", "gate_refusal_NLE")}
    with pytest.raises(InputError, match=rf"identify.rule={rule} needs scores .* capture.scores=\["):
        identify(replace(answered(), **plain), by_prompt_tokens(rule=rule, **FEW))


@pytest.mark.parametrize("rule", ["attribution", "comply_refuse"])
def test_a_batch_without_answers_is_named(rule):
    counts = answered()
    kept = counts.take(~of(counts, "response", "unsafe"))
    with pytest.raises(InputError, match=rf"identify.rule={rule}: batch 0 lacks answers to .*capture.generate"):
        identify(kept, by_prompt_tokens(rule=rule, **FEW))


def test_examples_without_an_answer_are_left_out_and_batches_without_any_have_no_numbers():
    counts = concat_counts([answered(1), answered(2, batch_idx=1)])
    unanswered = (counts.role == "response") & ((counts.batch_idx == 1) | (counts.in_batch_idx == 8))
    kept = counts.take(~unanswered)
    assert len(next(example_counts(kept)).answers.tokens_M) == 2 * PROMPTS - 1
    risk = identify(kept, by_prompt_tokens(**FEW))
    missing = risk["attribution_diff"].isna()
    assert missing[risk["batch_idx"] == 1].all()
    assert not missing[risk["batch_idx"] == 0].any()
    assert risk["reap_diff"].notna().all()


def test_counts_without_scores_have_no_column_of_them():
    counts = answered()
    only = replace(counts, attribution_NLE=None, gate_NLE=None, refusal_NLE=None, gate_refusal_NLE=None)
    assert [comparison.columns[2] for comparison in captured_comparisons(only, by_prompt_tokens())] == ["reap_diff"]
    risk = identify(only, by_prompt_tokens(**FEW))
    assert "attribution_diff" not in risk
    assert "reap_diff" in risk


def test_pairs_restrict_the_relabellings_of_scores():
    counts = answered(4, planted=2.0)
    pairs = np.array([f"pair {index % PROMPTS}" for index in counts.in_batch_idx], dtype=object)
    risk = identify(replace(counts, pair=pairs), by_prompt_tokens(rule="attribution", **FEW))
    assert (risk["p"] * 2**PROMPTS % 1 == 0).all()


@pytest.mark.slow
@pytest.mark.parametrize("rule", ["attribution", "comply_refuse"])
def test_labels_that_mean_nothing_are_rarely_certified(rule):
    """At most one in ten of sixty null batches: 0.05 and two standard errors."""
    config = by_prompt_tokens(rule=rule, permutations=1000, resamples=0)
    alarms = [identify(answered(seed, prompts=8), config)["p_maxt"].min() <= 0.05 for seed in range(60)]
    assert np.mean(alarms) <= 0.107


def test_top_routed_takes_as_many_of_each_layer_by_unsafe_tokens_alone():
    counts = answered(6)
    config = by_prompt_tokens(rule="top_routed", per_layer_quota=2, **FEW)
    risk = identify(counts, config)
    chosen = select_batches(risk, config)[0]
    for layer in (0, 1):
        of_layer = risk[risk["layer"] == layer].sort_values("a_unsafe", ascending=False, kind="stable")
        expected = {(layer, expert) for expert in of_layer["expert"][:2]}
        assert {expert for expert in chosen if expert.layer == layer} == expected
    assert ranking_column(config) == "a_unsafe"
    with pytest.raises(InputError, match="rule: got 'top_routed'"):
        replace(config, alpha=0.05)


def test_every_rule_names_its_source_and_ranks_by_a_column_of_the_table():
    risk = identify(answered(), by_prompt_tokens(**FEW))
    for rule in RULES:
        config = by_prompt_tokens(rule=rule)
        assert ranking_column(config) in risk or rule == "esft_gate"
        assert len(RULES[rule].source) > 20
