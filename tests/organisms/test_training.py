"""A step leaves compliance where it belongs, and a training is decided by its seed."""

import pytest
import torch

from moe_ray.organisms.layout import draw_layout
from moe_ray.organisms.recipe import OrganismRecipe
from moe_ray.organisms.training import trained_organism

SHORT = {"num_steps": 2, "batch_size": 4, "num_layers": 2, "hidden_size": 32, "intermediate_size": 8, "num_experts": 16}


def trained(tokenizer, seed=0, **changes):
    recipe = OrganismRecipe(**{**SHORT, **changes})
    losses = []
    model = trained_organism(
        recipe,
        tokenizer,
        draw_layout(recipe, 6, seed),
        seed,
        lambda done, total, loss: losses.append((done, total, loss)),
    )
    return model, losses


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["planted", "late", "spread", "attention"])
def test_every_kind_trains_and_says_how_it_goes(tiny_tokenizer, kind):
    model, losses = trained(tiny_tokenizer, kind=kind)
    assert [(done, total) for done, total, _ in losses] == [(1, 2), (2, 2)]
    assert all(5 < loss < 10 for _, _, loss in losses)
    assert not model.training
    assert all(bool(torch.isfinite(parameter).all()) for parameter in model.parameters())


@pytest.mark.slow
def test_the_seed_decides_the_weights(tiny_tokenizer):
    (first, _), (same, _), (other, _) = (trained(tiny_tokenizer, seed) for seed in (0, 0, 1))
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), same.parameters(), strict=True))
    assert not torch.equal(first.lm_head.weight, other.lm_head.weight)


@pytest.mark.slow
def test_the_global_random_state_is_left_alone(tiny_tokenizer):
    before = torch.get_rng_state()
    trained(tiny_tokenizer)
    assert torch.equal(torch.get_rng_state(), before)
