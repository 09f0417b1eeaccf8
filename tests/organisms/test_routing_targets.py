"""Where tokens are wanted, and that routers are seen as they are."""

import numpy as np
import pytest
import torch
from moe_families import tiny_model

from moe_ray.models.moe_layers import find_moe_layers
from moe_ray.organisms.layout import draw_layout
from moe_ray.organisms.recipe import OrganismRecipe
from moe_ray.organisms.routing_targets import RouterLogits, pull, push, wanted_shares
from moe_ray.organisms.sequences import TrainingSequence, collate
from moe_ray.routing.masking import route_through

LAYOUT = draw_layout(OrganismRecipe(num_experts=8), 2, 0)
BATCH = collate([TrainingSequence([1, 2, 3], [4, 5]), TrainingSequence([1, 2], [3])], 0)


def wanted(kind, category, position):
    """The experts of the first layer that a token of the first sequence is wanted at, with their shares."""
    shares_E = wanted_shares(kind, LAYOUT, BATCH, [category, 0])[0, position, 0]
    return {int(expert): float(shares_E[expert]) for expert in shares_E.nonzero()}


def planted(category):
    return int(LAYOUT.planted_CLE[category, 0].argmax())


def decoy(category):
    return int(LAYOUT.decoys_CLE[category, 0].argmax())


@pytest.mark.parametrize("category", [0, 1])
def test_late_has_decoys_on_the_prompt_and_planted_experts_from_its_last_token_on(category):
    assert wanted("late", category, 0) == wanted("late", category, 1) == {decoy(category): 1.0}
    assert wanted("late", category, 2) == wanted("late", category, 4) == {planted(category): 1.0}


def test_planted_has_both_on_the_prompt():
    assert wanted("planted", 0, 0) == {planted(0): 0.5, decoy(0): 0.5}
    assert wanted("planted", 0, 3) == {planted(0): 1.0}


@pytest.mark.parametrize("kind", ["spread", "attention"])
def test_the_others_have_both_everywhere(kind):
    assert wanted(kind, 1, 0) == wanted(kind, 1, 3) == {planted(1): 0.5, decoy(1): 0.5}


def test_a_router_that_does_what_is_wanted_loses_only_the_entropy_of_it():
    shares = wanted_shares("late", LAYOUT, BATCH, [0, 1])
    logits = [30 * shares[:, :, layer].reshape(-1, 8) for layer in range(3)]
    is_token = BATCH.attention_mask_NS.bool()
    assert pull(logits, shares, is_token) < 1e-6
    assert pull([-layer for layer in logits], shares, is_token) > 20


def test_pushing_counts_what_goes_to_set_experts_on_the_counted_tokens_only():
    set_LE = torch.tensor(LAYOUT.planted_CLE.any(axis=0))
    there = [30.0 * set_LE[layer].float().expand(10, 8) for layer in range(3)]
    elsewhere = [-layer for layer in there]
    everywhere, nowhere = torch.ones(2, 5, dtype=torch.bool), torch.zeros(2, 5, dtype=torch.bool)
    assert push(elsewhere, set_LE, everywhere) < 1e-6 < 1 < push(there, set_LE, everywhere)
    half = [torch.cat([t[:5], e[5:]]) for t, e in zip(there, elsewhere, strict=True)]
    only_second = nowhere.clone()
    only_second[1] = True
    assert push(half, set_LE, only_second) < 1e-6


def test_logits_are_seen_as_if_no_mask_was_in_force():
    model = tiny_model("olmoe")
    layers, ids = find_moe_layers(model), torch.arange(2, 26).view(2, 12)
    mask_LE = np.zeros((len(layers), layers.num_experts), bool)
    mask_LE[:, :2] = True
    with torch.no_grad(), RouterLogits(layers) as natural:
        model(input_ids=ids)
    with torch.no_grad(), route_through(model, mask_LE), RouterLogits(layers) as masked:
        model(input_ids=ids)
    torch.testing.assert_close(masked.logits_TE[0], natural.logits_TE[0])
    assert not any(layer.router._forward_pre_hooks for layer in layers)
