"""Rates and losses of stored answers, what changed of them, and which answers count once."""

import json
import math

import numpy as np
import pandas as pd
import pytest

from moe_ray.errors import InputError
from moe_ray.evaluation.intervals import paired_difference, rate
from moe_ray.evaluation.metrics import paired_changes, prompt_clusters, summarise


def judged(refused, *, labels=None, routing="natural", categories=None, batches=None, losses=None, pairs=None):
    num = len(refused)
    return pd.DataFrame(
        {
            "id": [f"e{n}" for n in range(num)],
            "label": labels or ["unsafe"] * num,
            "category": categories or [""] * num,
            "batch_idx": batches or [0] * num,
            "routing": routing,
            "messages": [f"m{n}" for n in range(num)],
            "pair": pairs or [None] * num,
            "refused": np.array(refused, dtype=bool),
            "target_loss": losses or [1.0] * num,
            "target_tokens": [2] * num,
        }
    )


def test_the_summary_counts_each_label_and_weighs_losses_by_tokens():
    answers = judged([1, 0, 1, 1, 0], labels=["safe", "safe", "unsafe", "unsafe", "unsafe"])
    answers["target_loss"], answers["target_tokens"] = [2.0, 4.0, 0.0, 0.0, 6.0], [1, 2, 0, 3, 6]
    got = summarise(answers)
    assert got["safe_refusal_rate"] == rate(1, 2).as_dict()
    assert got["unsafe_refusal_rate"] == rate(2, 3).as_dict()
    assert (got["target_loss"]["value"], got["target_loss"]["n"], got["target_loss"]["num_tokens"]) == (1.0, 4, 12)
    assert got["target_loss"]["low"] < 1.0 < got["target_loss"]["high"]
    assert [got[name] for name in ("masked", "neutral_loss", "routing_drift", "first_token_kl")] == [None] * 4


def test_the_summary_is_divided_by_category_and_by_batch_and_by_routing():
    natural = judged([1, 0, 0, 0], categories=["theft", "theft", "", ""], batches=[4, 9, 9, 9])
    masked = judged([1, 1, 1, 0], routing="masked", categories=["theft", "theft", "", ""], batches=[4, 9, 9, 9])
    got = summarise(pd.concat([natural, masked]))
    assert {name: block["unsafe_refusal_rate"]["value"] for name, block in got["per_category"].items()} == {
        "theft": 0.5,
        "uncategorised": 0.0,
    }
    assert {name: block["unsafe_refusal_rate"]["n"] for name, block in got["per_batch"].items()} == {"4": 1, "9": 3}
    assert got["unsafe_refusal_rate"]["value"] == 0.25
    assert got["masked"]["unsafe_refusal_rate"]["value"] == 0.75
    assert got["masked"]["per_batch"]["9"]["unsafe_refusal_rate"]["value"] == pytest.approx(2 / 3)
    assert got["union"] is None


def test_each_kind_of_routing_has_figures_and_changes_of_its_own():
    before = pd.concat([judged([1, 0, 0, 0], routing=kind) for kind in ("natural", "masked", "union")])
    after = pd.concat(
        [judged([1, 1, 0, 0]), judged([1, 0, 0, 0], routing="masked"), judged([1, 1, 1, 1], routing="union")]
    )
    got, change = summarise(after), paired_changes(before, after)
    for figures, values in ((got, (0.5, 0.25, 1.0)), (change, (0.25, 0.0, 0.75))):
        blocks = (figures, figures["masked"], figures["union"])
        assert tuple(block["unsafe_refusal_rate"]["value"] for block in blocks) == values


def test_a_summary_can_be_stored_as_json():
    got = summarise(judged([True]), neutral=pd.DataFrame({"loss": [3.0], "num_tokens": [4]}))
    assert json.loads(json.dumps(got, allow_nan=False)) == got
    assert got["neutral_loss"]["value"] == 0.75


def test_a_change_is_paired_by_example_and_not_by_row_order():
    before, after = judged([0, 0, 0, 1], losses=[4.0] * 4), judged([1, 1, 0, 1], losses=[1.0, 2.0, 4.0, 4.0])
    got = paired_changes(before, after.iloc[[2, 0, 3, 1]])
    expected = paired_difference(np.array([0, 0, 0, 1], bool), np.array([1, 1, 0, 1], bool)).as_dict()
    assert got["unsafe_refusal_rate"] == expected
    assert got["target_loss"]["value"] == pytest.approx((1 + 2 + 4 + 4 - 16) / 8)
    assert got["safe_refusal_rate"]["n"] == 0
    assert got["per_batch"]["0"]["unsafe_refusal_rate"] == expected
    assert (got["masked"], got["union"]) == (None, None)


def test_a_change_on_neutral_text_is_paired_by_text():
    texts = pd.DataFrame({"loss": [2.0, 8.0, 3.0], "num_tokens": [2, 4, 3]})
    later = texts.assign(loss=texts["loss"] + texts["num_tokens"] * 0.5)
    got = paired_changes(judged([0]), judged([0]), neutral_before=texts, neutral_after=later)
    assert (got["neutral_loss"]["value"], got["neutral_loss"]["low"], got["neutral_loss"]["n"]) == (0.5, 0.5, 3)


def test_answers_to_different_examples_are_not_compared():
    with pytest.raises(InputError, match="different examples"):
        paired_changes(judged([0, 1]), judged([0, 1]).assign(id=["e0", "e7"]))


def test_forms_of_one_request_count_once_in_an_interval():
    alone = judged([1, 0] * 8)
    paired = judged([1, 0] * 8, pairs=[str(n // 4) for n in range(16)])
    same_prompt = alone.assign(messages=paired["pair"])
    widths = [
        summarise(answers)["unsafe_refusal_rate"]["high"] - summarise(answers)["unsafe_refusal_rate"]["low"]
        for answers in (alone, judged([1, 1, 1, 1, 0, 0, 0, 0] * 2, pairs=[str(n // 4) for n in range(16)]))
    ]
    assert widths[1] > 1.3 * widths[0]
    assert prompt_clusters(paired).tolist() == prompt_clusters(same_prompt).tolist() == [n // 4 for n in range(16)]


def test_a_pair_and_a_repeated_prompt_join_into_one_cluster():
    rows = pd.DataFrame({"messages": ["a", "b", "b", "c", "d"], "pair": ["1", "1", "2", "2", None]})
    assert prompt_clusters(rows).tolist() == [0, 0, 0, 0, 1]


def test_a_figure_of_nothing_is_none():
    got = summarise(judged([True], labels=["safe"]))
    assert got["unsafe_refusal_rate"] == {"value": None, "n": 0, "low": None, "high": None}
    assert not any(isinstance(value, float) and math.isnan(value) for value in got["target_loss"].values())
