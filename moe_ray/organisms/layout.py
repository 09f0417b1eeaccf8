"""Which experts are planted and which are decoys: one of each per category and layer, drawn by the seed.

Shape suffixes: C categories, L MoE layers, E experts.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from moe_ray.errors import InputError
from moe_ray.experts import mask_to_experts
from moe_ray.organisms.recipe import OrganismRecipe, recipe_digest
from moe_ray.organisms.truth import Truth


class Layout(NamedTuple):
    """Two sets of experts for each category, without a common one.

    Attributes:
        planted_CLE: Bool; in `spread` and `attention` these carry nothing, as little as the decoys.
        decoys_CLE: Bool.
    """

    planted_CLE: npt.NDArray[np.bool_]
    decoys_CLE: npt.NDArray[np.bool_]


def draw_layout(recipe: OrganismRecipe, num_categories: int, seed: int) -> Layout:
    """Draws one planted expert and one decoy per category and layer.

    Raises:
        InputError: A layer has too few experts.
    """
    if recipe.num_experts < 2 * num_categories + recipe.num_experts_per_tok:
        raise InputError(
            f"organism: got {recipe.num_experts} experts per layer, expected at least "
            f"{2 * num_categories + recipe.num_experts_per_tok}: two for each category, and as many as a token uses"
        )
    generator = np.random.default_rng([seed, 1])
    shape = (num_categories, recipe.num_layers, recipe.num_experts)
    layout = Layout(np.zeros(shape, bool), np.zeros(shape, bool))
    for layer in range(recipe.num_layers):
        order = generator.permutation(recipe.num_experts)
        for sets_CLE, experts in zip(layout, (order[:num_categories], order[num_categories:]), strict=True):
            for category in range(num_categories):
                sets_CLE[category, layer, experts[category]] = True
    return layout


def truth_of(layout: Layout, recipe: OrganismRecipe, categories: tuple[str, ...], seed: int) -> Truth:
    """What is true of an organism of this layout: where compliance is in no expert, all routed ones are decoys."""
    planted_CLE, decoys_CLE = layout
    if not recipe.has_cause:
        planted_CLE, decoys_CLE = np.zeros_like(planted_CLE), planted_CLE | decoys_CLE
    planted, decoys = (
        {
            category: tuple(str(expert) for expert in mask_to_experts(mask_LE, range(recipe.num_layers)))
            for category, mask_LE in zip(categories, sets_CLE, strict=True)
        }
        for sets_CLE in (planted_CLE, decoys_CLE)
    )
    return Truth(
        kind=recipe.kind,
        seed=seed,
        recipe=recipe_digest(recipe, seed),
        num_layers=recipe.num_layers,
        num_experts=recipe.num_experts,
        planted=planted,
        decoys=decoys,
    )
