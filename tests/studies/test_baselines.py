"""Baselines: the same steps, as many experts, and nothing of what makes the per-batch masks what they are."""

import dataclasses

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_ray.config.compare import BASELINES, CompareConfig
from moe_ray.config.finetune import FinetuneConfig
from moe_ray.config.keys import keys_of
from moe_ray.errors import InputError
from moe_ray.experts import Expert, masks_from_experts
from moe_ray.studies.baselines import (
    OURS,
    average_size,
    esft_masks,
    global_masks,
    plan_arms,
    random_masks,
    shuffled_masks,
)

LAYERS, NUM_EXPERTS = (1, 2, 4), 6
EVERYTHING = [Expert(layer, expert) for layer in LAYERS for expert in range(NUM_EXPERTS)]


def risk_table(batches, seed=0, *, weights=False):
    rng = np.random.default_rng(seed)
    rows = [(batch, *expert) for batch in batches for expert in EVERYTHING]
    table = pd.DataFrame(rows, columns=["batch_idx", "layer", "expert"])
    for name in ("a_safe", "a_unsafe"):
        table[name] = rng.integers(1, 100, len(table))
    table["d_safe"], table["d_unsafe"] = 300, 300
    table["a_safe_n"], table["a_unsafe_n"] = table["a_safe"] / 300, table["a_unsafe"] / 300
    table["risk_diff"] = table["a_unsafe_n"] - table["a_safe_n"]
    if weights:
        table["w_unsafe"] = rng.random(len(table))
    return table


@st.composite
def masks_of_batches(draw, min_trained=2):
    names = draw(st.lists(st.integers(0, 50), min_size=min_trained, max_size=6, unique=True))
    some = st.lists(st.sampled_from(EVERYTHING), min_size=1, max_size=len(EVERYTHING), unique=True)
    selected = {batch: draw(some) for batch in sorted(names)}
    untrained = max(names) + 1
    return masks_from_experts({**selected, untrained: ()}, layers=LAYERS, num_experts=NUM_EXPERTS)


def sizes(masks):
    return {batch: len(masks.selected[batch]) for batch in masks.batch_idx}


@settings(max_examples=6, deadline=None)
@given(masks_of_batches(), st.integers(0, 5))
def test_every_arm_trains_the_batches_that_ours_trains(ours, seed):
    risk = risk_table(ours.batch_idx, seed, weights=True)
    for arm in plan_arms(ours, risk, FinetuneConfig(patience=2), CompareConfig(draws=2)):
        if arm.masks is not None:
            assert arm.masks.trained_batches == ours.trained_batches
            assert arm.masks.batch_idx == ours.batch_idx
        assert arm.train.epochs == FinetuneConfig().epochs
        assert arm.train.patience == 0


@settings(max_examples=25, deadline=None)
@given(masks_of_batches(), st.integers(0, 5))
def test_random_masks_have_as_many_experts_of_each_layer_and_batch(ours, seed):
    drawn = random_masks(ours, seed=seed)
    assert np.array_equal(drawn.masks_BLE.sum(axis=2), ours.masks_BLE.sum(axis=2))
    assert drawn.digest() == random_masks(ours, seed=seed).digest()


def test_random_masks_differ_between_seeds_and_batches():
    ours = masks_from_experts({3: EVERYTHING[:4], 8: EVERYTHING[:4]}, layers=LAYERS, num_experts=NUM_EXPERTS)
    drawn = [random_masks(ours, seed=seed) for seed in range(5)]
    assert len({masks.digest() for masks in drawn}) == 5
    assert any((masks[3] != masks[8]).any() for masks in drawn)


@settings(max_examples=50, deadline=None)
@given(masks_of_batches(), st.integers(0, 20))
def test_shuffled_masks_are_the_same_masks_and_no_batch_keeps_its_own(ours, seed):
    marked = dataclasses.replace(ours)
    shuffled = shuffled_masks(marked, seed=seed)
    trained = ours.trained_batches
    assert sorted(map(sorted, shuffled.selected.values())) == sorted(map(sorted, ours.selected.values()))
    distinct = len({tuple(sorted(ours.selected[batch])) for batch in trained}) == len(trained)
    if distinct:
        assert all(set(shuffled.selected[batch]) != set(ours.selected[batch]) for batch in trained)


def test_one_batch_has_no_other_whose_mask_it_could_get():
    ours = masks_from_experts({3: EVERYTHING[:4]}, layers=LAYERS, num_experts=NUM_EXPERTS)
    with pytest.raises(InputError, match="2 or more"):
        shuffled_masks(ours, seed=0)
    arms = plan_arms(ours, risk_table([3]), FinetuneConfig(), CompareConfig())
    assert "shuffled_0" not in [arm.name for arm in arms]


def test_the_global_mask_is_the_same_for_all_and_holds_the_largest_mean_differences():
    ours = masks_from_experts(
        {3: EVERYTHING[:4], 8: EVERYTHING[4:6], 9: EVERYTHING[:3]}, layers=LAYERS, num_experts=NUM_EXPERTS
    )
    risk = risk_table([3, 8, 9])
    masks = global_masks(ours, risk, num_experts=average_size(ours))
    assert average_size(ours) == 3
    means = risk.groupby(["layer", "expert"])["risk_diff"].mean().sort_values(ascending=False)
    expected = {Expert(*pair) for pair in means.index[:3]}
    assert all(set(masks.selected[batch]) == expected for batch in (3, 8, 9))


def test_esft_takes_the_largest_shares_of_a_layer_and_as_many_per_batch():
    ours = masks_from_experts({3: EVERYTHING[:2], 8: EVERYTHING[:5]}, layers=LAYERS, num_experts=NUM_EXPERTS)
    risk = risk_table([3, 8])
    risk["a_unsafe"] = 1
    # Half of a small layer is a larger share than a third of a large one.
    risk.loc[(risk["layer"] == 1) & (risk["expert"] == 0), "a_unsafe"] = 500
    risk.loc[(risk["layer"] == 1) & (risk["expert"] == 5), "a_unsafe"] = 500
    risk.loc[(risk["layer"] == 4) & (risk["expert"] == 2), "a_unsafe"] = 50
    masks = esft_masks(ours, risk, column="a_unsafe")
    assert sizes(masks) == sizes(ours)
    assert masks.selected[3] == (Expert(4, 2), Expert(1, 0))


def test_esft_gate_without_captured_weights_is_refused_when_named_and_left_out_when_not():
    ours = masks_from_experts({3: EVERYTHING[:2], 8: EVERYTHING[:5]}, layers=LAYERS, num_experts=NUM_EXPERTS)
    with pytest.raises(InputError, match=r"capture\.weights=true"):
        plan_arms(ours, risk_table([3, 8]), FinetuneConfig(), CompareConfig(names=("esft_gate",)))
    names = [arm.name for arm in plan_arms(ours, risk_table([3, 8]), FinetuneConfig(), CompareConfig(draws=1))]
    assert names == [
        OURS, "freezing_only", "global", "global_union", "random_0", "shuffled_0", "esft_token", "all_experts", "full",
    ]  # fmt: skip


def test_freezing_only_differs_from_ours_in_routing_alone_and_full_in_having_no_mask():
    ours = masks_from_experts({3: EVERYTHING[:2], 8: EVERYTHING[:5]}, layers=LAYERS, num_experts=NUM_EXPERTS)
    names = ("freezing_only", "full", "all_experts")
    baselines = CompareConfig(names=names, full_learning_rate=1e-5)
    first, freezing, full, everything = plan_arms(ours, risk_table([3, 8]), FinetuneConfig(), baselines)
    assert freezing.masks is ours
    assert freezing.train == dataclasses.replace(first.train, routing="natural")
    assert full.masks is None
    assert full.train == dataclasses.replace(first.train, learning_rate=1e-5)
    assert everything.masks is not None
    assert everything.masks.masks_BLE.all()


def test_every_baseline_is_described_where_it_is_chosen():
    (names,) = (key for key in keys_of() if key.name == "compare.names")
    assert [name for name in BASELINES if f"; {name} = " not in names.setting.text] == []


def test_an_unknown_baseline_is_named():
    with pytest.raises(InputError, match=r"compare\.names: got 'lora'"):
        CompareConfig(names=("lora",))


def test_an_arms_repr_is_one_line():
    ours = masks_from_experts({0: EVERYTHING[:2], 1: EVERYTHING[1:3]}, layers=LAYERS, num_experts=NUM_EXPERTS)
    arms = plan_arms(ours, risk_table((0, 1)), FinetuneConfig(), CompareConfig(names=("full",)))
    assert [repr(arm) for arm in arms] == ["Arm(per_batch, 3 experts in the union)", "Arm(full, every parameter)"]
