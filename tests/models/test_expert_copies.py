"""Experts that are copies of each other are noticed, whatever the family, and nothing else is taken for them."""

from __future__ import annotations

import pytest
import torch
from families import SOME_FAMILIES, made_equal, shared
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from moe_ray.errors import InputError
from moe_ray.models.expert_copies import experts_are_copies
from moe_ray.models.moe_layers import find_moe_layers


@pytest.mark.parametrize("family", SOME_FAMILIES)
def test_equal_experts_are_copies_and_trained_ones_are_not(family):
    assert experts_are_copies(made_equal(family))
    assert not experts_are_copies(shared(family))


def test_one_number_of_one_expert_of_the_last_layer_makes_the_difference():
    model = made_equal("olmoe")
    weight = find_moe_layers(model)[-1].expert_tensors()["down_proj"]
    with torch.no_grad():
        weight[-1, -1, -1] = torch.nextafter(weight[-1, -1, -1], torch.tensor(torch.inf))
    assert not experts_are_copies(model)


@pytest.mark.parametrize("is_equal", [True, False])
def test_experts_that_are_modules_of_their_own_are_compared_as_well(is_equal):
    model = made_equal("olmoe")
    for layer in model.model.layers:
        modules = [nn.Linear(4, 4) for _ in range(layer.mlp.experts.num_experts)]
        for module in modules[1:] if is_equal else []:
            module.load_state_dict(modules[0].state_dict())
        layer.mlp.experts = type("PlainExperts", (nn.ModuleList,), {"num_experts": 8, "forward": four_arguments})(
            modules
        )
    assert experts_are_copies(model) is is_equal


def four_arguments(self, hidden_states, top_k_index, top_k_weights):
    return hidden_states


def test_offloaded_experts_cannot_be_looked_at_and_are_not_called_copies(tmp_path):
    from accelerate import dispatch_model

    places = dict.fromkeys(("model.embed_tokens", "model.layers.0", "model.norm", "model.rotary_emb", "lm_head"), "cpu")
    model = dispatch_model(
        made_equal("olmoe"), places | {"model.layers.1": "disk"}, main_device="cpu", offload_dir=tmp_path
    )
    assert not experts_are_copies(model)


def test_a_dense_model_is_refused():
    config = LlamaConfig(vocab_size=8, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1)
    with pytest.raises(InputError, match="no Mixture-of-Experts layer"):
        experts_are_copies(LlamaForCausalLM(config))
