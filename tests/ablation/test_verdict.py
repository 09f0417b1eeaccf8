"""The rule and its words: significance and size, and how often it is wrong where nothing is going on."""

from __future__ import annotations

import math

import numpy as np
import pandas as pd
import pytest

from moe_ray.ablation.tables import batch_table, effect_table
from moe_ray.ablation.verdict import batch_in_words, in_words, of_batch, overall, refusals_in_words
from moe_ray.config.ablate import AblateConfig

CONFIG = AblateConfig()


def table(own=(1.4, 1.0, 1.8), lift=(3.0, 2.4, 3.8), p=(0.001, 0.001), controls=()):
    rows = [
        {"set": "selected", "unsafe": own[0], "safe": 0.0, "specific": own[0], "specific_low": own[1],
         "specific_high": own[2], "p_prompts": p[0], "share": 0.3, "batches": 12},
        {"set": "matched", "unsafe": 0.0, "safe": 1.62, "specific": -1.62, "lift": lift[0], "lift_low": lift[1],
         "lift_high": lift[2], "p_sets": p[1], "share": 0.31, "batches": 12},
    ]  # fmt: skip
    rows += [{"set": name, "lift": value, "lift_low": low, "lift_high": high} for name, value, low, high in controls]
    return pd.DataFrame(rows)


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (table(), "causal"),
        (table(p=(0.2, 0.001)), "undecided"),
        (table(p=(0.001, 0.2)), "undecided"),
        (table(own=(0.05, 0.03, 0.07), lift=(0.05, 0.03, 0.07), p=(1e-4, 1e-4)), "not"),
        # Others matter to safe answers, which is no effect of the selection.
        (table(own=(0.0, -0.02, 0.02)), "not"),
        (table(lift=(0.0, -0.05, 0.05)), "not"),
        (table(own=(0.4, 0.05, 0.8)), "undecided"),
        (table(lift=(0.4, 0.05, 0.8)), "undecided"),
        (table(own=(1.4, math.nan, math.nan), lift=(3.0, math.nan, math.nan)), "undecided"),
        (pd.DataFrame(), "nothing"),
    ],
)
def test_a_cause_takes_significance_and_size_of_effect_and_lift(given, expected):
    assert overall(given, CONFIG) == expected


def test_the_sentence_has_the_figures_and_what_is_better_than_what():
    given = table(controls=[("other", 0.45, 0.14, 0.76), ("global", 0.07, -0.31, 0.35)])
    assert in_words("causal", given, pd.DataFrame()) == (
        "Without a batch's selected experts the model's answers to unsafe prompts lose 1.40 nats a token and to safe ones "
        "0.00; without other experts of the same share 0.00 and 1.62 (+3.00 [2.40, 3.80]; p = 0.001; 12 batches): causal; "
        "better than another category's list (+0.45 [0.14, 0.76]); not shown to be better than one global list "
        "(+0.07 [-0.31, 0.35])."
    )


def test_controls_that_have_fewer_tokens_are_not_said_to_have_as_many():
    given = table()
    given.loc[1, "share"] = 0.1
    assert "as many other experts, which have 10% of the tokens and not 30%," in in_words(
        "causal", given, pd.DataFrame()
    )


def test_where_everything_was_refused_that_is_said():
    words = in_words("nothing", pd.DataFrame(), pd.DataFrame({"refused": [8, 7]}))
    assert words == "Nothing to take away: the model itself refuses what it was asked (15 unsafe prompts of 2 batches)."


def row(**given):
    return {
        "batch_idx": 3, "category": "fraud", "n_unsafe": 8, "n_safe": 8, "refused": 0, "experts": 5.0, "unsafe": 1.5,
        "safe": 0.0, "specific": 1.5, "matched_unsafe": 0.0, "matched_safe": 0.1, "lift": 1.6, "p_prompts": 0.001,
        "p_holm": 0.01, "beats_every_draw": True,
    } | given  # fmt: skip


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (row(), "causal"),
        (row(p_holm=0.2), "undecided"),
        (row(beats_every_draw=False), "undecided"),
        (row(specific=0.05), "not"),
        (row(lift=0.05), "undecided"),
        (row(lift=0.05, p_prompts=0.5), "not"),
        (row(n_unsafe=0, refused=8), "nothing"),
        (row(p_prompts=math.nan), "undecided"),
    ],
)
def test_a_batch_is_judged_by_its_prompts_and_its_own_draws(given, expected):
    assert of_batch(given, CONFIG) == expected


def test_a_batch_in_words():
    assert batch_in_words(row(), "causal") == (
        "Batch 3 (fraud): without its 5 experts answers to unsafe prompts lose 1.50 nats a token, to safe ones 0.00; "
        "without as many others 0.00 and 0.10: causal."
    )
    assert batch_in_words(row(n_unsafe=0, refused=8), "nothing").endswith("what it was asked (8 unsafe prompts).")


def test_refusals_without_the_selection_are_counted_by_label():
    answers = pd.DataFrame(
        {
            "label": ["unsafe"] * 4 + ["safe"] * 2,
            "state": ["answered"] * 3 + ["refused", "answered", "refused"],
            "refused_without": [True, True, False, None, False, True],
        }
    )
    assert refusals_in_words(answers) == (
        "Without them 67% of 3 unsafe prompts that the model answers are refused, and 50% of 2 safe ones (50% with them), "
        "by the wording of the answers."
    )
    assert refusals_in_words(answers.drop(columns="refused_without")) == ""


def null_effects(rng, *, batches, prompts, draws, is_of_sets):
    """Effects in which the selection is like any other set; or in which labels mean nothing, whatever the sets do."""
    shape = (batches, 1 + draws, 2, prompts)
    of_sets = rng.normal(size=(*shape[:2], 2 if is_of_sets else 1, 1)) * 0.5
    values = rng.standard_t(4, size=shape) * 0.3 + of_sets
    batch, place, label, prompt = (axis.ravel() for axis in np.indices(shape))
    return pd.DataFrame(
        {
            "batch_idx": batch,
            "category": [f"c{number % 6}" for number in batch],
            "set": np.where(place, "matched", "selected").astype(object),
            "draw": np.maximum(0, place - 1),
            "expert": "",
            "id": [f"{one}-{two}-{three}" for one, two, three in zip(batch, label, prompt, strict=True)],
            "label": np.where(label, "safe", "unsafe").astype(object),
            "pair": None,
            "effect": values.ravel(),
            "experts": 3,
            "share": 0.2,
        }
    )


@pytest.mark.slow
@pytest.mark.parametrize("is_of_sets", [True, False])
def test_where_nothing_is_going_on_a_cause_is_shown_in_at_most_seven_of_a_hundred(is_of_sets):
    """Without any smallest effect, which would hide false alarms: what is left is chance, at a level of one in twenty."""
    config = AblateConfig(min_effect=0.0, relabellings=150)
    rng, trials, overall_alarms, batch_alarms = np.random.default_rng(0), 60, 0, 0
    for trial in range(trials):
        effects = null_effects(rng, batches=6, prompts=6, draws=5, is_of_sets=is_of_sets)
        answers = effects[effects["set"] == "selected"].assign(state="answered")
        overall_alarms += overall(effect_table(effects, config, seed=trial), config) == "causal"
        if not is_of_sets:
            rows = batch_table(effects, answers, config, seed=trial).to_dict("records")
            batch_alarms += any(of_batch(one, config) == "causal" for one in rows)
    assert overall_alarms / trials <= 0.07
    assert batch_alarms / trials <= 0.07


@pytest.mark.slow
def test_an_effect_of_that_size_is_found_in_most_of_the_same_simulations():
    config = AblateConfig(relabellings=200)
    rng, trials, found = np.random.default_rng(1), 30, 0
    for trial in range(trials):
        effects = null_effects(rng, batches=6, prompts=6, draws=5, is_of_sets=False)
        effects.loc[(effects["set"] == "selected") & (effects["label"] == "unsafe"), "effect"] += 1.5
        found += overall(effect_table(effects, config, seed=trial), config) == "causal"
    assert found / trials >= 0.9
