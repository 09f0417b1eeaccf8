"""Which experts a baseline trains: as many as the per-batch masks, or as large a union, and none of what makes them ours."""

import dataclasses

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from risk_tables import EVERYTHING, LAYERS, NUM_EXPERTS, masks_of_batches, risk_table

from moe_ray.errors import InputError
from moe_ray.experts import Expert, masks_from_experts
from moe_ray.studies.baseline_masks import (
    average_size,
    global_masks,
    largest_of_layers,
    largest_shares,
    masks_around,
    only_batches,
    random_masks,
    renamed_masks,
    shuffled_masks,
    sieve_masks,
)


def sizes(masks):
    return {batch: len(masks.selected[batch]) for batch in masks.batch_idx}


def some_masks(selected):
    return masks_from_experts(selected, layers=LAYERS, num_experts=NUM_EXPERTS)


@settings(max_examples=25)
@given(masks_of_batches(), st.integers(0, 5))
def test_random_masks_have_as_many_experts_of_each_layer_and_batch(ours, seed):
    drawn = random_masks(ours, seed=seed)
    assert np.array_equal(drawn.masks_BLE.sum(axis=2), ours.masks_BLE.sum(axis=2))
    assert drawn.digest() == random_masks(ours, seed=seed).digest()


@settings(max_examples=25)
@given(masks_of_batches(), st.integers(0, 5))
def test_renamed_masks_have_the_same_sizes_and_overlaps_of_layers_batches_and_union(ours, seed):
    renamed = renamed_masks(ours, seed=seed)
    assert np.array_equal(renamed.masks_BLE.sum(axis=2), ours.masks_BLE.sum(axis=2))
    assert np.array_equal(renamed.union.sum(axis=1), ours.union.sum(axis=1))
    both = [np.einsum("ale,ble->ab", m.masks_BLE.astype(int), m.masks_BLE.astype(int)) for m in (renamed, ours)]
    assert np.array_equal(*both)


def test_random_masks_differ_between_seeds_and_batches():
    ours = some_masks({3: EVERYTHING[:4], 8: EVERYTHING[:4]})
    for make in (random_masks, renamed_masks):
        drawn = [make(ours, seed=seed) for seed in range(5)]
        assert len({masks.digest() for masks in drawn}) > 1
    assert any((masks[3] != masks[8]).any() for masks in (random_masks(ours, seed=seed) for seed in range(5)))


@settings(max_examples=50)
@given(masks_of_batches(), st.integers(0, 20), st.integers(1, 3))
def test_no_batch_gets_a_mask_of_its_own_category(ours, seed, num_categories):
    trained = ours.trained_batches
    category_of = {batch: f"c{position % num_categories}" for position, batch in enumerate(trained)}
    if len(set(category_of.values())) == 1:
        category_of = {}
    # Whose mask a batch got is told by an expert that only one batch has.
    marked = dataclasses.replace(
        ours, selected={batch: ((batch, 0),) if ours.selected[batch] else () for batch in ours.batch_idx}
    )
    layers = tuple(range(max(ours.batch_idx) + 1))
    marked = masks_from_experts(marked.selected, layers=layers, num_experts=1)
    shuffled = shuffled_masks(marked, category_of, seed=seed)
    assert shuffled.trained_batches == trained
    for batch in trained:
        ((giver, _),) = shuffled.selected[batch]
        assert giver != batch
        if category_of:
            assert category_of[giver] != category_of[batch]


def test_categories_with_as_many_batches_exchange_all_their_masks():
    selected = {batch: EVERYTHING[batch : batch + 2] for batch in range(6)}
    ours = some_masks(selected)
    shuffled = shuffled_masks(ours, {batch: "ab"[batch % 2] for batch in range(6)}, seed=0)
    assert sorted(map(sorted, shuffled.selected.values())) == sorted(map(sorted, ours.selected.values()))


def test_one_batch_has_no_other_whose_mask_it_could_get():
    with pytest.raises(InputError, match="2 or more"):
        shuffled_masks(some_masks({3: EVERYTHING[:4]}), {3: "fraud"}, seed=0)


def test_the_global_mask_is_the_same_for_all_and_holds_the_largest_mean_differences():
    ours = some_masks({3: EVERYTHING[:4], 8: EVERYTHING[4:6], 9: EVERYTHING[:3]})
    risk = risk_table([3, 8, 9])
    masks = global_masks(ours, risk, num_experts=average_size(ours))
    assert average_size(ours) == 3
    means = risk.groupby(["layer", "expert"])["risk_diff"].mean().sort_values(ascending=False)
    expected = {Expert(*pair) for pair in means.index[:3]}
    assert all(set(masks.selected[batch]) == expected for batch in (3, 8, 9))
    by_rate = global_masks(ours, risk, num_experts=3, column="a_unsafe_n")
    means = risk.groupby(["layer", "expert"])["a_unsafe_n"].mean().sort_values(ascending=False)
    assert set(by_rate.selected[3]) == {Expert(*pair) for pair in means.index[:3]}


def test_esft_takes_the_largest_shares_of_a_layer_and_as_many_per_batch():
    ours = some_masks({3: EVERYTHING[:2], 8: EVERYTHING[:5]})
    risk = risk_table([3, 8])
    risk["a_unsafe"] = 1
    # Half of a small layer is a larger share than a third of a large one.
    risk.loc[(risk["layer"] == 1) & (risk["expert"] == 0), "a_unsafe"] = 500
    risk.loc[(risk["layer"] == 1) & (risk["expert"] == 5), "a_unsafe"] = 500
    risk.loc[(risk["layer"] == 4) & (risk["expert"] == 2), "a_unsafe"] = 50
    masks = largest_shares(ours, risk, column="a_unsafe").masks()
    assert sizes(masks) == sizes(ours)
    assert masks.selected[3] == (Expert(4, 2), Expert(1, 0))


@settings(max_examples=10)
@given(masks_of_batches(), st.integers(0, 5), st.sampled_from(["a_unsafe", "reap_unsafe"]))
def test_the_largest_of_a_layer_are_as_many_of_each_layer_and_none_that_is_left_out_is_larger(ours, seed, column):
    risk = risk_table(ours.batch_idx, seed, weights=True)
    masks = largest_of_layers(ours, risk.sample(frac=1, random_state=seed), column=column).masks()
    assert np.array_equal(masks.masks_BLE.sum(axis=2), ours.masks_BLE.sum(axis=2))
    for batch in ours.trained_batches:
        values = risk[risk["batch_idx"] == batch].set_index(["layer", "expert"])[column].unstack().to_numpy()
        for value_E, taken_E in zip(values, masks[batch], strict=True):
            if taken_E.any() and not taken_E.all():
                assert value_E[taken_E].min() >= value_E[~taken_E].max()


@pytest.mark.slow
@settings(max_examples=25)
@given(masks_of_batches(), st.integers(0, 5), st.integers(1, len(EVERYTHING)))
def test_a_ranking_reaches_a_union_as_well_as_growing_all_batches_alike_can(ours, seed, target):
    ranked = largest_shares(ours, risk_table(ours.batch_idx, seed), column="a_unsafe")
    masks = ranked.masks_of_union(target)
    assert masks.trained_batches == ours.trained_batches
    reached = abs(len(masks.union_experts) - target)
    tried = [abs(ranked.union_size(growth) - target) for growth in np.linspace(0, len(EVERYTHING), 200)]
    assert reached <= min(tried)
    # Of the numbers for each batch that give this union, those that are nearest to ours.
    alike = [growth for growth in np.linspace(0, 3, 300) if abs(ranked.union_size(growth) - target) == reached]
    sizes_of = [len(ranked.masks(growth).selected[ours.trained_batches[0]]) for growth in alike]
    own = len(ours.selected[ours.trained_batches[0]])
    got = len(masks.selected[ours.trained_batches[0]])
    assert all(abs(got - own) <= abs(size - own) + 1 for size in sizes_of)


def test_the_sieve_takes_a_quarter_of_each_layer_by_all_tokens_of_all_trained_batches():
    ours = some_masks({3: EVERYTHING[:2], 8: EVERYTHING[:5], 9: ()})
    risk = risk_table([3, 8, 9])
    risk.loc[risk["batch_idx"] == 9, "a_safe"] = 10**6  # does not train
    masks = sieve_masks(ours, risk)
    of_trained = risk[risk["batch_idx"] != 9]
    totals = of_trained.assign(tokens=of_trained["a_safe"] + of_trained["a_unsafe"])
    by_expert = totals.groupby(["layer", "expert"])["tokens"].sum().unstack().to_numpy()
    expected = np.argsort(-by_expert, axis=1, kind="stable")[:, :2]  # a quarter of 6, rounded
    for batch in (3, 8):
        assert [sorted(np.flatnonzero(row)) for row in masks[batch]] == [sorted(row) for row in expected.tolist()]
    assert masks.trained_batches == (3, 8)


def test_only_the_named_batches_train():
    ours = some_masks({3: EVERYTHING[:2], 8: EVERYTHING[:5]})
    one = only_batches(ours, {8})
    assert one.trained_batches == (8,)
    assert one.selected[8] == ours.selected[8]
    assert one.batch_idx == ours.batch_idx


@settings(max_examples=25)
@given(masks_of_batches())
def test_around_a_batchs_experts_are_all_others(ours):
    around = masks_around(ours, [*ours.batch_idx, 99])
    for batch in ours.batch_idx:
        assert np.array_equal(around[batch], ~ours[batch])
    assert around[99].all()


@pytest.mark.parametrize(
    ("column", "said"), [("w_unsafe", r"capture\.weights=true"), ("reap_unsafe", r"capture\.scores=\[reap\]")]
)
def test_a_column_that_is_not_there_is_named_with_what_makes_it(column, said):
    ours = some_masks({3: EVERYTHING[:2]})
    table: pd.DataFrame = risk_table([3])
    with pytest.raises(InputError, match=said):
        largest_shares(ours, table, column=column)
