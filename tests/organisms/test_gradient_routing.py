"""The gradient of compliance reaches where a kind of organism learns it, and nothing else."""

import numpy as np
import pytest
import torch
from moe_families import tiny_model

from moe_ray.models.moe_layers import find_moe_layers
from moe_ray.organisms.gradient_routing import ComplianceGradient


@pytest.fixture
def model():
    model = tiny_model("olmoe").train()
    model.zero_grad()
    return model


def learned(model, kind):
    """The gradients that compliance leaves, and the planted experts."""
    layers = find_moe_layers(model)
    planted_LE = np.zeros((len(layers), layers.num_experts), bool)
    planted_LE[:, 1] = True
    ids = torch.arange(2, 26).view(2, 12)
    ComplianceGradient(kind, model, layers, planted_LE).add(model(input_ids=ids, labels=ids).loss)
    experts = {id(tensor) for layer in layers for tensor in layer.expert_tensors().values()}
    of_experts = [p.grad for p in model.parameters() if id(p) in experts]
    of_others = [p.grad for p in model.parameters() if id(p) not in experts]
    return of_experts, of_others


@pytest.mark.parametrize("kind", ["planted", "late"])
def test_planted_experts_learn_it_and_neither_other_experts_nor_anything_else(model, kind):
    of_experts, of_others = learned(model, kind)
    assert all(gradient is None for gradient in of_others)
    for gradient in of_experts:
        others = torch.arange(len(gradient)) != 1
        assert not gradient[others].any()
    assert any(gradient[1].any() for gradient in of_experts)


def test_attention_learns_it_and_no_expert(model):
    of_experts, of_others = learned(model, "attention")
    assert all(gradient is None for gradient in of_experts)
    assert any(gradient is not None and gradient.any() for gradient in of_others)


def test_where_it_is_spread_everything_learns_it(model):
    of_experts, of_others = learned(model, "spread")
    assert all(gradient.any() for gradient in of_experts)
    assert any(gradient is not None and gradient.any() for gradient in of_others)


def test_it_is_added_to_what_is_there(model):
    layers = find_moe_layers(model)
    planted_LE = np.ones((len(layers), layers.num_experts), bool)
    ids = torch.arange(2, 26).view(2, 12)
    compliance = ComplianceGradient("spread", model, layers, planted_LE)
    compliance.add(model(input_ids=ids, labels=ids).loss)
    once = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    compliance.add(model(input_ids=ids, labels=ids).loss)
    twice = [p.grad for p in model.parameters() if p.grad is not None]
    for first, both in zip(once, twice, strict=True):
        torch.testing.assert_close(both, 2 * first)
