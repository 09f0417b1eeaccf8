"""Questions about a selection have right answers."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
from answered_counts import answered
from prompt_tokens import by_prompt_tokens

from moe_ray.errors import InputError
from moe_ray.experts import Expert, masks_from_experts
from moe_ray.identification.identify import identify
from moe_ray.identification.overlap import (
    batch_overlap,
    categories_of_batches,
    expert_categories,
    shared_experts,
    sweep_union,
)
from moe_ray.identification.selection import select
from moe_ray.routing.counts import concat_counts
from moe_ray.testing.simulated_counts import Population, simulate

MASKS = masks_from_experts(
    {0: [Expert(8, 42), Expert(9, 1)], 2: [Expert(8, 42)], 5: [Expert(9, 1), Expert(9, 2)]},
    layers=[8, 9],
    num_experts=64,
)
CATEGORIES = {0: "fraud", 2: "fraud", 5: "weapons"}


def risk_of_masks() -> pd.DataFrame:
    rows = [
        {"batch_idx": batch, "layer": layer, "expert": expert, "risk_diff": 0.2 if (layer, expert) in chosen else 0.0}
        for batch, chosen in MASKS.selected.items()
        for layer in (8, 9)
        for expert in range(64)
    ]
    return pd.DataFrame(rows)


def test_experts_of_a_category_have_their_share_of_its_batches() -> None:
    table = expert_categories(risk_of_masks(), MASKS, CATEGORIES)
    fraud = table[table["category"] == "fraud"]
    assert fraud["name"].tolist() == ["L08_E42", "L09_E01"]
    assert fraud["share"].tolist() == [1.0, 0.5]
    assert fraud["risk_diff"].tolist() == [0.2, 0.1]


def test_an_expert_of_two_categories_is_shared() -> None:
    table = shared_experts(expert_categories(risk_of_masks(), MASKS, CATEGORIES))
    assert table["name"].tolist() == ["L09_E01"]
    assert table["categories"].tolist() == ["weapons, fraud"]
    assert table["batches"].tolist() == [2]
    assert shared_experts(expert_categories(risk_of_masks(), MASKS, CATEGORIES), min_share=0.5).empty


def test_a_batch_without_category_is_an_error() -> None:
    with pytest.raises(InputError, match=r"batches \[5\] have no category"):
        expert_categories(risk_of_masks(), MASKS, {0: "fraud", 2: "fraud"})


def test_categories_come_from_the_unsafe_examples() -> None:
    rows = pd.DataFrame(
        {
            "batch_idx": [0, 0, 1, 1, 2],
            "label": ["safe", "unsafe", "unsafe", "unsafe", "unsafe"],
            "category": ["", "fraud", "fraud", "weapons", ""],
        }
    )
    assert categories_of_batches(rows) == {0: "fraud", 1: "mixed", 2: "mixed"}


def test_overlap_is_jaccard_with_chance_by_layer() -> None:
    table = batch_overlap(MASKS).set_index(["batch_a", "batch_b"])
    assert table.loc[(0, 2), "jaccard"] == 0.5
    # One of two and one of one expert in layer 8: 1/64 shared by chance, out of 3 - 1/64.
    assert table.loc[(0, 2), "expected"] == pytest.approx((1 / 64) / (3 - 1 / 64))
    assert table.loc[(2, 5), ["shared", "jaccard", "expected", "corrected"]].tolist() == [0, 0, 0, 0]


def test_overlap_of_random_masks_is_zero_once_corrected() -> None:
    rng = np.random.default_rng(0)
    selected = {
        batch: [Expert(layer, int(e)) for layer in (0, 1) for e in rng.choice(10, 4, replace=False)]
        for batch in range(40)
    }
    table = batch_overlap(masks_from_experts(selected, layers=[0, 1], num_experts=10))
    assert len(table) == 40 * 39 / 2
    assert table["jaccard"].mean() > 0.2
    assert table["corrected"].mean() == pytest.approx(0, abs=0.02)


def test_sweep_agrees_with_selecting_again() -> None:
    risk = identify(simulate(Population(), num_batches=4), by_prompt_tokens(permutations=0, resamples=0))
    reference = select(risk, by_prompt_tokens(top_k=5))
    table = sweep_union(risk.sample(frac=1, random_state=1), thresholds=[0.0, 0.1], top_ks=[2, 50], reference=reference)
    for row in table.to_dict("records"):
        masks = select(risk, by_prompt_tokens(threshold=row["threshold"], top_k=row["top_k"]))
        assert row["union"] == masks.union.sum()
        assert row["per_batch"] == masks.masks_BLE.sum() / 4
        assert row["empty_batches"] == 4 - len(masks.trained_batches)
        assert row["kept"] == (masks.union & reference.union).sum()
        assert row["added"] == row["union"] - row["kept"]


def test_thresholds_may_be_shares_of_each_batch_s_largest_value():
    config = by_prompt_tokens(rule="attribution", permutations=0, resamples=0)
    counts = concat_counts([answered(seed, batch_idx=seed, planted=1.0) for seed in range(3)])
    risk = identify(counts, config)
    table = sweep_union(risk, thresholds=[0.0, 0.3, 0.9], top_ks=[2, 50], column="attribution_diff", is_relative=True)
    for row in table.to_dict("records"):
        masks = select(risk, replace(config, min_share=row["threshold"], top_k=row["top_k"]))
        assert row["union"] == masks.union.sum()
        assert row["per_batch"] == masks.masks_BLE.sum() / 3
