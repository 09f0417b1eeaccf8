"""Experts and routers are found by structure in every family, and what cannot be read is refused."""

from __future__ import annotations

import pytest
import torch
from families import BIASED, FAMILIES, HIDDEN, LAYERS, NUM_EXPERTS, build, shared
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from moe_ray.errors import InputError
from moe_ray.experts import Expert
from moe_ray.models.moe_layers import find_moe_layers, routing_of_call


@pytest.mark.parametrize("family", FAMILIES)
def test_layers_carry_the_models_own_decoder_layer_index(family):
    assert find_moe_layers(shared(family)).layers == LAYERS.get(family, (0, 1))


@pytest.mark.parametrize("family", FAMILIES)
def test_number_of_experts_and_of_experts_per_token_are_the_models(family):
    moe_layers = find_moe_layers(shared(family))
    assert (moe_layers.num_experts, moe_layers.num_experts_per_tok) == (NUM_EXPERTS, 3 if family == "olmoe" else 2)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_router_is_the_module_with_one_row_per_expert(family):
    for layer in find_moe_layers(shared(family)):
        shapes = [tuple(parameter.shape) for parameter in layer.router.parameters(recurse=False)]
        assert (NUM_EXPERTS, HIDDEN) in shapes


@pytest.mark.parametrize("family", FAMILIES)
def test_expert_tensors_hold_all_the_experts_parameters(family):
    for layer in find_moe_layers(shared(family)):
        held = sum(tensor.numel() for tensor in layer.expert_tensors().values())
        assert held == sum(parameter.numel() for parameter in layer.experts.parameters())


@pytest.mark.parametrize("family", FAMILIES)
def test_selection_biases_are_found_wherever_the_family_keeps_them(family):
    sizes = [[bias.numel() for bias in layer.selection_biases()] for layer in find_moe_layers(shared(family))]
    assert sizes == [[NUM_EXPERTS] if family in BIASED else []] * 2


def test_gpt_oss_experts_have_bias_tensors():
    names = set(find_moe_layers(build("gpt_oss"))[0].expert_tensors())
    assert names == {"gate_up_proj", "gate_up_proj_bias", "down_proj", "down_proj_bias"}


def test_a_dense_model_is_refused():
    config = LlamaConfig(vocab_size=8, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1)
    with pytest.raises(InputError, match="no Mixture-of-Experts layer"):
        find_moe_layers(LlamaForCausalLM(config))


def test_layers_of_different_size_are_refused():
    model = build("olmoe")
    experts = model.model.layers[1].mlp.experts
    experts.num_experts = 4
    for name in ("gate_up_proj", "down_proj"):
        setattr(experts, name, nn.Parameter(getattr(experts, name)[:4].detach()))
    model.model.layers[1].mlp.gate.weight = nn.Parameter(model.model.layers[1].mlp.gate.weight[:4].detach())
    with pytest.raises(InputError, match="same number of experts"):
        find_moe_layers(model)


def test_a_second_router_candidate_is_refused():
    model = build("mixtral")
    model.model.layers[0].mlp.router = nn.Linear(HIDDEN, NUM_EXPERTS)
    with pytest.raises(InputError, match="exactly one module"):
        find_moe_layers(model)


def test_a_call_with_other_arguments_is_refused():
    layer = find_moe_layers(build("olmoe"))[0]
    with pytest.raises(InputError, match="another way"):
        routing_of_call(layer, (torch.zeros(3, HIDDEN), torch.zeros(3, 2)), {})


def test_the_row_of_a_layer_counts_layers_with_experts_only():
    assert find_moe_layers(build("jamba")).row_of(3) == 1


def test_experts_sort_by_layer_then_index_and_print_short():
    assert [str(e) for e in sorted([Expert(8, 42), Expert(8, 3), Expert(2, 50)])] == ["L02_E50", "L08_E03", "L08_E42"]
