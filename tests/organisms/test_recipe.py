"""A recipe names its folder, and knows its kinds."""

import pytest

from moe_ray.errors import InputError
from moe_ray.organisms.recipe import KINDS, OrganismRecipe, embedded_folder


@pytest.mark.slow
def test_another_seed_kind_or_recipe_has_another_folder():
    default, late, short = OrganismRecipe(), OrganismRecipe(kind="late"), OrganismRecipe(num_steps=3)
    built = [(default, 0), (default, 1), (late, 0), (short, 0)]
    assert len({embedded_folder("cache", seed=seed, recipe=recipe) for recipe, seed in built}) == 4


def test_an_unknown_kind_is_refused_with_those_that_there_are():
    with pytest.raises(InputError, match=f"got kind 'hidden', expected one of {', '.join(KINDS)}"):
        OrganismRecipe(kind="hidden")
