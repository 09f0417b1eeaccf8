"""What is said about significance follows the certainty table."""

from __future__ import annotations

import json
import math

import pandas as pd
from prompt_tokens import by_prompt_tokens

from moe_ray.experts import Expert
from moe_ray.identification.findings import findings_of, joined
from moe_ray.identification.identify import identify
from moe_ray.report.certainty_text import certainty_in_words, describe_certainty, known_significance, significance_level
from moe_ray.testing.simulated_counts import Population, simulate


def certainty(**columns):
    row = {
        "batch_idx": 4,
        "num_selected": 6,
        "num_significant": 2,
        "smallest_p_maxt": 0.002,
        "median_stability": 0.75,
        "certifiable": 0.1234,
        "is_significant": True,
    }
    return pd.DataFrame([row | columns])


def test_a_significant_batch_says_how_many_experts_and_what_the_batch_could_show():
    head, sentence = certainty_in_words(certainty(), by_prompt_tokens())
    assert head == (
        "1 of 1 batches have at least one selected expert with corrected p of at most 0.05 (permutation test over prompts, "
        "maxT over all experts of the batch)."
    )
    assert sentence == (
        "Batch 4: 2 of 6 selected experts are significant (smallest corrected p 0.002); the median one is selected in 75% "
        "of prompt resamples; a risk difference of 0.123 or more would have been significant at a typical expert."
    )


def test_a_batch_without_significance_is_not_distinguishable_from_noise():
    table = certainty(is_significant=False, num_significant=0, smallest_p_maxt=0.31, certifiable=math.inf)
    head, sentence = certainty_in_words(table, by_prompt_tokens(alpha=0.01))
    assert head.startswith("0 of 1 batches have at least one selected expert with corrected p of at most 0.01")
    assert head.endswith("; in 1 the selection is not distinguishable from noise.")
    assert (
        "none of its 6 selected experts is distinguishable from noise (smallest corrected p of any expert 0.31)"
        in sentence
    )
    assert sentence.endswith("no risk difference, however large, could have been significant at a typical expert.")


def test_a_batch_without_experts_says_so():
    table = certainty(is_significant=False, num_significant=0, num_selected=0)
    assert certainty_in_words(table, by_prompt_tokens())[1].startswith(
        "Batch 4: no expert is selected; a risk difference of"
    )


def test_without_resamples_nothing_is_said_about_stability():
    assert "resamples" not in certainty_in_words(certainty(median_stability=math.nan), by_prompt_tokens())[1]


def test_without_a_permutation_test_nothing_is_said_about_noise():
    table = certainty(is_significant=None)
    assert known_significance(table).empty
    (only,) = certainty_in_words(table, by_prompt_tokens(permutations=0))
    assert "nothing is said about noise" in only


def test_the_level_is_the_filter_s_or_the_usual_one():
    assert significance_level(by_prompt_tokens()) == 0.05
    assert significance_level(by_prompt_tokens(alpha=0.01)) == 0.01


def described(*, shift):
    counts = simulate(Population(), num_batches=2, planted=(Expert(1, 3),) if shift else (), shift=shift, seed=3)
    selection = by_prompt_tokens(permutations=200, resamples=0)
    risk = identify(counts, selection)
    found = joined([findings_of(risk, selection, seed=0)], selection, layers=counts.layers, num_experts=16)
    messages = json.dumps([{"role": "user", "content": "how \x1b[2J"}])
    batches = pd.DataFrame({"label": counts.label, "messages": messages})
    return describe_certainty(counts, found.certainty, batches, selection), found.certainty


def test_planted_experts_are_significant_and_noise_is_not():
    text, table = described(shift=0.7)
    assert text.startswith("2 of 2 batches")
    assert table["is_significant"].all()
    assert "not distinguishable" not in text
    text, table = described(shift=0.0)
    assert text.startswith("0 of 2 batches")
    assert not table["is_significant"].any()
    assert "Batches whose selection is not distinguishable from noise: [0, 1]" in text


def test_it_says_what_another_weighting_would_select_and_warns_of_confounds():
    text, _ = described(shift=0.7)
    assert "equal weight per prompt overlap by" in text
    assert "\x1b" not in text


def test_what_is_certain_is_named_after_the_rule_and_has_its_unit():
    _, sentence = certainty_in_words(certainty(certifiable=0.00123456), by_prompt_tokens(rule="attribution"))
    assert "a difference of weight attribution of 0.00123 or more would have been significant" in sentence
    _, sentence = certainty_in_words(certainty(certifiable=math.inf), by_prompt_tokens(rule="comply_refuse"))
    assert "no difference between answers and refusals, however large, could have been significant" in sentence


def test_an_overlap_that_is_not_of_the_run_s_own_rule_says_whose_it_is():
    counts = simulate(Population(), num_batches=1)
    for rule, whose in (("risk_diff", "\nThe experts"), ("top_routed", "\nBy risk difference alone, the experts")):
        selection = by_prompt_tokens(rule=rule, threshold=-1.0, permutations=0, resamples=0)
        table = findings_of(identify(counts, selection), selection, seed=0)
        found = joined([table], selection, layers=counts.layers, num_experts=16)
        batches = pd.DataFrame({"label": ["safe"], "messages": [json.dumps([{"role": "user", "content": "hello"}])]})
        text = describe_certainty(counts, found.certainty, batches, selection)
        assert f"{whose} selected from pooled tokens" in text
