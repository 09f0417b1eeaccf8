"""Planted experts and decoys: as many of each, none of them both, other ones for another seed."""

import numpy as np
import pytest

from moe_ray.errors import InputError
from moe_ray.organisms.layout import draw_layout, truth_of
from moe_ray.organisms.recipe import OrganismRecipe

CATEGORIES = ("a", "b", "c")


def test_every_category_has_one_planted_expert_and_one_decoy_in_every_layer():
    planted_CLE, decoys_CLE = draw_layout(OrganismRecipe(), 6, 0)
    assert (planted_CLE.sum(axis=2) == 1).all()
    assert (decoys_CLE.sum(axis=2) == 1).all()


def test_no_expert_has_two_parts():
    planted_CLE, decoys_CLE = draw_layout(OrganismRecipe(), 6, 0)
    assert (planted_CLE.sum(axis=0) + decoys_CLE.sum(axis=0)).max() == 1


def test_the_seed_decides_and_another_one_draws_others():
    first, same, other = (draw_layout(OrganismRecipe(), 6, seed) for seed in (0, 0, 1))
    assert np.array_equal(first.planted_CLE, same.planted_CLE)
    assert not np.array_equal(first.planted_CLE, other.planted_CLE)


def test_too_few_experts_are_refused():
    with pytest.raises(InputError, match="got 13 experts per layer, expected at least 14"):
        draw_layout(OrganismRecipe(num_experts=13), 6, 0)


@pytest.mark.parametrize("kind", ["spread", "attention"])
def test_where_no_expert_is_the_cause_none_is_planted_and_all_routed_ones_are_decoys(kind):
    recipe = OrganismRecipe(kind=kind)
    layout = draw_layout(recipe, 3, 0)
    truth = truth_of(layout, recipe, CATEGORIES, 0)
    assert not truth.planted_mask().any()
    assert np.array_equal(truth.decoy_mask(), (layout.planted_CLE | layout.decoys_CLE).any(axis=0))


@pytest.mark.parametrize("kind", ["planted", "late"])
def test_where_experts_are_the_cause_the_truth_names_them(kind):
    recipe = OrganismRecipe(kind=kind)
    layout = draw_layout(recipe, 3, 0)
    truth = truth_of(layout, recipe, CATEGORIES, 0)
    for idx, category in enumerate(CATEGORIES):
        assert np.array_equal(truth.planted_mask(category), layout.planted_CLE[idx])
        assert np.array_equal(truth.decoy_mask(category), layout.decoys_CLE[idx])
