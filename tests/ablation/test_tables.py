"""Means over prompts, then sets, then batches; what intervals count; and prompts that several batches were asked."""

from __future__ import annotations

import math

import numpy as np
import pandas as pd
import pytest

from moe_ray.ablation.tables import (
    batch_table,
    clusters_of,
    effect_table,
    expert_table,
    label_groups,
    set_means,
    usable_batches,
)
from moe_ray.config.ablate import AblateConfig
from moe_ray.prompts.batches import MIXED

CONFIG = AblateConfig(relabellings=200)


def effects_of(batch, unsafe, safe, *, name="selected", draw=0, expert="", category="a", ids=None):
    """A row per prompt of one set."""
    values = [*unsafe, *safe]
    return pd.DataFrame(
        {
            "batch_idx": batch, "category": category, "id": ids or [f"{batch}-{place}" for place in range(len(values))],
            "label": ["unsafe"] * len(unsafe) + ["safe"] * len(safe), "pair": None, "set": name, "draw": draw,
            "expert": expert, "effect": values, "experts": 2, "share": 0.25,
        }
    )  # fmt: skip


def answers_of(batch, states=("answered",) * 4, category="a"):
    labels = ["unsafe"] * 2 + ["safe"] * 2
    return pd.DataFrame({"batch_idx": batch, "category": category, "label": labels, "state": states, "answer": "x"})


TWO = pd.concat(
    [
        effects_of(0, [2.0, 4.0], [0.0, 1.0]),
        effects_of(0, [0.0, 1.0], [0.0, 0.0], name="matched", draw=0),
        effects_of(0, [1.0, 2.0], [0.0, 0.0], name="matched", draw=1),
        effects_of(1, [1.0, 2.0], [0.0, 0.0]),
        effects_of(1, [0.0, 0.0], [1.0, 1.0], name="matched", draw=0),
        effects_of(1, [0.0, 0.0], [0.0, 0.0], name="matched", draw=1),
        effects_of(0, [2.0, 2.0], [0.0, 0.0], name="alone", expert="L00_E01"),
        effects_of(0, [1.0, 1.0], [0.0, 0.0], name="spared", expert="L00_E01"),
        effects_of(1, [1.0, 1.0], [0.0, 0.0], name="coalition", draw=2),
    ]
)


def test_specific_is_the_mean_over_unsafe_prompts_minus_that_over_safe_ones():
    means = set_means(TWO).set_index(["batch_idx", "set", "draw"])
    own = means.loc[(0, "selected", 0)]
    assert (own["unsafe"], own["safe"], own["specific"]) == (3.0, 0.5, 2.5)
    assert (own["n_unsafe"], own["n_safe"]) == (2, 2)
    assert means.loc[(1, "matched", 0), "specific"] == -1


def test_lift_is_against_the_mean_of_the_draws_averaged_over_batches():
    table = effect_table(TWO, CONFIG, seed=0).set_index("set")
    assert table.loc["selected", "specific"] == 2.0  # 2.5 and 1.5
    assert table.loc["matched", "specific"] == pytest.approx((1.0 + -0.5) / 2)
    assert table.loc["matched", "lift"] == pytest.approx(((2.5 - 1.0) + (1.5 + 0.5)) / 2)
    assert table.loc["matched", "draws"] == 2
    assert table.loc["matched", "p_sets"] == 1 / 9
    assert math.isnan(table.loc["selected", "p_sets"])
    assert table.loc["coalition 2", "batches"] == 1


def test_a_batch_with_one_scored_prompt_of_a_label_is_in_no_overall_figure():
    lone = effects_of(2, [100.0], [0.0, 0.0])
    effects = pd.concat([TWO, lone])
    assert usable_batches(set_means(effects)) == [0, 1]
    assert effect_table(effects, CONFIG, seed=0).set_index("set").loc["selected", "unsafe"] < 4


def test_without_safe_prompts_nothing_is_specific():
    means = set_means(effects_of(0, [1.0, 2.0], []))
    assert means["safe"].isna().all()
    assert usable_batches(means) == []


def test_intervals_count_categories_where_there_are_four():
    ids, name = clusters_of(["a", "b", "c", "d", "a"])
    assert name == "categories"
    assert ids[0] == ids[4]
    assert len(set(ids.tolist())) == 4
    for few in (["a", "b", "c", "a"], ["a", "b", "c", "d", MIXED]):
        ids, name = clusters_of(few)
        assert name == "batches"
        assert len(set(ids.tolist())) == len(few)


def test_a_prompt_that_several_batches_were_asked_is_one_prompt():
    ids = ["p", "q", "r", "s"]
    effects = pd.concat(
        [
            effects_of(0, [2.0, 4.0], [0.0, 1.0], ids=ids),
            effects_of(1, [4.0, 0.0], [1.0, 0.0], ids=ids),
            effects_of(2, [1.0, 1.0], [0.0, 0.0]),
        ]
    )
    first, second = label_groups(effects)
    assert first.effects_N.tolist() == [3.0, 2.0, 0.5, 0.5]
    assert first.is_unsafe_N.tolist() == [True, True, False, False]
    assert len(second.effects_N) == 4


def test_a_batch_that_shares_prompts_with_two_others_makes_one_group_of_all_three():
    effects = pd.concat(
        [
            effects_of(0, [1.0], [0.0], ids=["p", "q"]),
            effects_of(1, [1.0], [0.0], ids=["r", "s"]),
            effects_of(2, [1.0, 1.0], [0.0, 0.0], ids=["p", "r", "q", "s"]),
        ]
    )
    assert [len(group.effects_N) for group in label_groups(effects)] == [4]


def test_a_batch_says_its_figures_its_p_and_what_was_left_out():
    answers = pd.concat([answers_of(0, ("answered", "refused", "answered", "answered")), answers_of(1)])
    table = batch_table(TWO, answers, CONFIG, seed=0).set_index("batch_idx")
    assert table.loc[0, "refused"] == 1
    assert table.loc[0, "lift"] == pytest.approx(1.5)
    assert table["beats_every_draw"].tolist() == [True, True]
    # Of all six ways to label four prompts the observed one is the best, or ties with none.
    assert table.loc[1, "p_prompts"] == 1 / 6
    assert table.loc[1, "p_holm"] == pytest.approx(2 / 6)


def test_a_batch_whose_model_refuses_everything_has_a_row_without_figures():
    answers = pd.concat([answers_of(0), answers_of(7, ("refused", "refused", "answered", "answered"))])
    row = batch_table(TWO, answers, CONFIG, seed=0).set_index("batch_idx").loc[7]
    assert row["refused"] == 2
    assert row["n_unsafe"] == 0
    assert np.isnan(row["p_prompts"])


def test_single_experts_alone_and_what_is_lost_without_them():
    (row,) = expert_table(TWO).to_dict("records")
    assert row == {
        "batch_idx": 0, "category": "a", "expert": "L00_E01", "alone": 2.0, "without_it": pytest.approx(1.5),
    }  # fmt: skip
    assert expert_table(TWO.iloc[:0]).empty
