"""What a run says of itself in words."""

from __future__ import annotations

import pandas as pd
import pytest
from answered_counts import answered
from prompt_tokens import by_prompt_tokens

from moe_ray.evaluation.own_answers import OwnAnswers
from moe_ray.experts import Expert, masks_from_experts
from moe_ray.identification.identify import identify
from moe_ray.identification.selection import select
from moe_ray.report.run_text import (
    describe_batches,
    describe_capture,
    describe_lost,
    describe_outcome,
    describe_pair_counts,
    describe_reasons,
    describe_selection,
    outcome_tables,
)


def test_pairs_say_how_many_were_dropped_and_why():
    counts = {"pairs": 10, "kept": 7, "dropped": {"both were refused": 2, "one is too long": 1}}
    assert (
        describe_pair_counts(counts) == "kept 7 of 10; dropped 2 because both were refused, 1 because one is too long"
    )
    assert describe_pair_counts({"pairs": 2, "kept": 2, "dropped": {}}) == "kept 2 of 2"


def test_the_most_frequent_reason_comes_first_and_equals_go_by_name():
    assert describe_reasons({"empty": 1, "too_long": 2, "crash": 1}) == "2 too_long, 1 crash, 1 empty"


def test_a_capture_says_what_it_left_out():
    notes = {"tokens": 12345, "examples": 10, "quarantined": 2, "padding_share": 0.125, "reasons": {"empty": 2}}
    counted, quarantined, truncated = describe_capture({**notes, "truncated": 1}).splitlines()
    assert counted == "12,345 tokens of 8 examples counted; 12.5% of the tokens in forward passes were padding"
    assert quarantined.startswith("2 examples in quarantine (2 empty), see routing/")
    assert truncated.startswith("1 examples were cut to the longest allowed length, see routing/")
    assert "padding" not in describe_capture({**notes, "padding_share": None, "truncated": 0})


def test_a_capture_says_what_the_model_answered_by_itself_and_how_much_of_it_refuses():
    notes = {"tokens": 10, "examples": 2, "quarantined": 0, "truncated": 0, "padding_share": None, "reasons": {}}
    totals = OwnAnswers()
    assert "by itself" not in describe_capture({**notes, "own_answers": totals.as_dict()})
    totals.add("unsafe", "I'm sorry, but I can't help with that.", 9, ended=True)
    totals.add("safe", "Sure", 3, ended=False)
    said = describe_capture({**notes, "own_answers": totals.as_dict()})
    assert "answered 2 examples by itself, in 12 tokens; 1 answers were cut" in said
    assert "1 of 1 answers to unsafe prompts are worded as refusals" in said


@pytest.mark.parametrize(("copies", "is_said"), [(True, True), (False, False), (None, False)])
def test_a_capture_says_that_experts_are_copies(copies, is_said):
    notes = {"tokens": 10, "examples": 2, "quarantined": 0, "truncated": 0, "padding_share": None, "reasons": {}}
    said = describe_capture({**notes, "experts_are_copies": copies})
    assert ("All experts of a layer are equal" in said) is is_said


def test_batches_without_a_mask_are_named_up_to_twenty():
    assert describe_lost([3, 5]).startswith("2 batches get no mask and are not trained, because")
    assert describe_lost([3, 5]).endswith(": [3, 5]")
    assert describe_lost(range(21)).endswith("19] …")


def test_batches_are_counted_by_label_and_category():
    batches = pd.DataFrame(
        {
            "batch_idx": [0, 0, 1, 1],
            "label": ["safe", "unsafe"] * 2,
            "category": ["fraud\x1b", "fraud\x1b", "", ""],
        }
    )
    first, second = describe_batches(batches, 5, 3).splitlines()
    assert first == "4 examples (2 safe, 2 unsafe) in 2 batches; 5 held out; 3 left over (too few for a batch)"
    assert second == "batches per category: uncategorised 1, fraud\ufffd 1"


def test_a_selection_shows_the_first_experts_and_counts_layers():
    rows = [(batch, layer, expert) for batch in (0, 1) for layer in (0, 1) for expert in range(4)]
    risk = pd.DataFrame(rows, columns=["batch_idx", "layer", "expert"])
    risk = risk.assign(risk_diff=(risk["expert"] - 1.0) / 8, a_safe_n=0.25, a_unsafe_n=0.5)
    risk = risk.assign(a_safe=2, d_safe=8, a_unsafe=4, d_unsafe=8)
    masks = masks_from_experts({0: (Expert(0, 3), Expert(0, 2), Expert(1, 3)), 1: ()}, layers=(0, 1), num_experts=4)
    text = describe_selection(risk, masks, 2, by_prompt_tokens())
    assert "Batch 0: 3 unsafe experts:" in text
    assert "L00_E03           0.2500       0.2500         0.5000" in text
    assert "Batch 1: 0 unsafe experts\n" in text
    assert "Unsafe experts per batch: 0 to 3, mean 1.5; union 3 of 8 experts" in text
    assert "without unsafe experts, where routing stays free: 0 to 2; with some, but fewer than the 2" in text
    assert "router picks per token: 0 to 1" in text
    assert text.endswith("which are not trained: [1]")


def block(unsafe, **more):
    rates = {"unsafe_refusal_rate": {"value": unsafe, "low": unsafe - 0.25, "high": unsafe + 0.25, "n": 8}}
    rates["safe_refusal_rate"] = {"value": None, "low": None, "high": None, "n": 0}
    return rates | {"target_loss": None, "neutral_loss": None, "masked": None, "routing_drift": None} | more


def test_an_outcome_has_parameters_rates_drift_and_categories():
    drift = {
        "mean_absolute_change": {"value": 0.02, "low": 0.019, "high": 0.021, "n": 8},
        "largest_change": {"value": -0.364, "low": None, "high": None, "n": 8},
        "layer": 2,
        "expert": 6,
    }
    categories = {"per_category": {name: block(0.25) for name in ("theft\x1b", "fraud")}}
    summary = {
        "trainable_parameters": 1000,
        "total_parameters": 4000,
        "frozen_parameters_changed": 0,
        "pairs": {"pairs": 2, "kept": 2, "dropped": {}},
        "before": block(0.25, **categories),
        "after": block(0.75, routing_drift=drift, **categories),
        "change": block(0.5, **categories),
    }
    text = describe_outcome(summary)
    assert text.startswith(
        "Trainable parameters: 1,000 of 4,000 (25.00%); frozen parameters changed: 0\nPairs: kept 2 of 2\n"
    )
    assert "mean absolute +2.0 points [+1.9, +2.1]; largest -36.4 points, of L02_E06" in text
    (overall, figures), (by_category, categories) = outcome_tables(summary)
    assert overall.startswith("Before and after")
    assert list(figures.iloc[0]) == [
        "unsafe prompts refused", "25.0% [0.0%, 50.0%]", "75.0% [50.0%, 100.0%]", "+50.0 points [+25.0, +75.0]", "8",
    ]  # fmt: skip
    assert by_category == "Natural routing, by category (before → after)"
    fraud, theft = categories.to_numpy().tolist()
    assert fraud == ["fraud", "25.0% → 25.0% (n = 8)", "+25.0 points [0.0, +50.0]", "–", "–"]
    assert theft[0] == "theft\ufffd"


def test_experts_that_a_score_ranks_are_shown_with_it_the_largest_first():
    config = by_prompt_tokens(rule="attribution", permutations=0, resamples=0)
    risk = identify(answered(planted=4.0), config)
    text = describe_selection(risk, select(risk, config), 1, config)
    assert text.startswith("The 10 experts with the largest difference of weight attribution, mean over 1 batches:")
    header, first = text.splitlines()[1:3]
    assert "difference of weight attribution" in header
    assert "risk difference" in header
    assert first.split()[:2] == ["L01_E02", f"{risk['attribution_diff'].max():.4f}"]
