"""Controls differ from the selection in one thing only: as many experts of each layer, none of them its own."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from moe_ray.ablation.expert_sets import (
    ALONE,
    SPARED,
    ExpertSet,
    busiest_set,
    coalitions,
    matched_set,
    routed_around,
    single_experts,
)
from moe_ray.experts import Expert

LAYERS = (2, 5)
RANKED = [Expert(5, 1), Expert(2, 0), Expert(2, 3), Expert(5, 2), Expert(5, 3)]


def mask_of(experts, num_experts=8):
    mask_LE = np.zeros((len(LAYERS), num_experts), dtype=bool)
    for expert in experts:
        mask_LE[LAYERS.index(expert.layer), expert.expert] = True
    return mask_LE


@st.composite
def selections(draw):
    num_layers, num_experts = draw(st.integers(1, 3)), draw(st.integers(2, 9))
    rng = np.random.default_rng(draw(st.integers(0, 2**16)))
    mask_LE = rng.random((num_layers, num_experts)) < draw(st.floats(0, 1))
    share_LE = rng.random((num_layers, num_experts))
    return mask_LE, share_LE / share_LE.sum(axis=1, keepdims=True), rng


@given(selections())
def test_a_matched_set_shares_no_expert_and_has_as_many_of_each_layer_as_there_are_others(drawn):
    mask_LE, share_LE, rng = drawn
    found_LE = matched_set(mask_LE, share_LE, rng)
    assert not (found_LE & mask_LE).any()
    sizes_L = mask_LE.sum(axis=1)
    assert found_LE.sum(axis=1).tolist() == np.minimum(sizes_L, mask_LE.shape[1] - sizes_L).tolist()


@given(selections())
def test_the_busiest_are_as_many_of_each_layer_and_no_other_has_more_unsafe_tokens(drawn):
    mask_LE, unsafe_LE, _ = drawn
    found_LE = busiest_set(mask_LE, unsafe_LE)
    assert found_LE.sum(axis=1).tolist() == mask_LE.sum(axis=1).tolist()
    for chosen_E, unsafe_E in zip(found_LE, unsafe_LE, strict=True):
        assert unsafe_E[chosen_E].min(initial=1) >= unsafe_E[~chosen_E].max(initial=0)


def test_matched_sets_have_nearly_the_share_and_are_not_all_the_same():
    share_LE = np.array([[0.20, 0.02, 0.19, 0.21, 0.22, 0.02, 0.03, 0.02]])
    mask_LE = np.array([[True, *[False] * 7]])
    rng = np.random.default_rng(0)
    found = {tuple(np.flatnonzero(matched_set(mask_LE, share_LE, rng)[0])) for _ in range(40)}
    assert found == {(2,), (3,), (4,)}


@given(selections(), st.integers(1, 4))
def test_a_layer_keeps_as_many_experts_as_a_token_uses_or_is_left_alone(drawn, num_experts_per_tok):
    mask_LE, *_ = drawn
    around_LE = routed_around(mask_LE, num_experts_per_tok)
    left_L = (~around_LE).sum(axis=1)
    assert all(left_L[layer] >= num_experts_per_tok or not around_LE[layer].any() for layer in range(len(mask_LE)))
    assert all(
        (around_LE[layer] == mask_LE[layer]).all() or not around_LE[layer].any() for layer in range(len(mask_LE))
    )


def test_a_forced_set_allows_itself_and_any_other_all_but_itself():
    mask_LE = mask_of(RANKED)
    assert (ExpertSet("selected", 0, "", mask_LE).allowed == ~mask_LE).all()
    assert (ExpertSet("forced", 0, "", mask_LE, is_forced=True).allowed == mask_LE).all()


def test_the_strongest_experts_are_taken_alone_and_spared_alone():
    mask_LE = mask_of(RANKED)
    found = single_experts(mask_LE, RANKED, LAYERS, most=2)
    assert [(item.name, item.expert) for item in found] == [
        (ALONE, "L05_E01"), (SPARED, "L05_E01"), (ALONE, "L02_E00"), (SPARED, "L02_E00"),
    ]  # fmt: skip
    for alone, spared in (found[:2], found[2:]):
        assert alone.mask_LE.sum() == 1
        assert ((alone.mask_LE | spared.mask_LE) == mask_LE).all()
        assert not (alone.mask_LE & spared.mask_LE).any()


def test_the_only_expert_of_a_selection_cannot_be_spared():
    assert [item.name for item in single_experts(mask_of(RANKED[:1]), RANKED, LAYERS, most=8)] == [ALONE]


@pytest.mark.parametrize(("num_sizes", "sizes"), [(0, []), (1, [1]), (5, [1, 2, 4])])
def test_coalitions_grow_by_rank_in_powers_of_two_and_never_hold_all(num_sizes, sizes):
    found = coalitions(mask_of(RANKED), RANKED, LAYERS, num_sizes)
    assert [item.draw for item in found] == sizes
    assert all((item.mask_LE == mask_of(RANKED[: item.draw])).all() for item in found)


def test_an_expert_of_a_layer_that_is_left_alone_is_in_no_coalition():
    mask_LE = mask_of(RANKED)
    mask_LE[1] = False
    assert [item.expert for item in single_experts(mask_LE, RANKED, LAYERS, most=8)[::2]] == ["L02_E00", "L02_E03"]
