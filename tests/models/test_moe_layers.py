"""Experts and routers are found by structure in every family, and what cannot be read is refused."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from families import BIASED, FAMILIES, HIDDEN, LAYERS, NUM_EXPERTS, build, shared, token_ids
from families import rows as some_rows
from torch import nn
from transformers import HunYuanMoEV1Config, HunYuanMoEV1ForCausalLM, LlamaConfig, LlamaForCausalLM

from moe_ray.errors import InputError
from moe_ray.experts import Expert
from moe_ray.models.moe_layers import find_moe_layers, routing_of_call
from moe_ray.routing.capture import count_rows
from moe_ray.routing.counter import counting
from moe_ray.routing.masking import route_through


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


@pytest.mark.parametrize("moe_topk", [2, [2, 2]])
def test_a_list_with_one_number_for_every_layer_is_read_as_released_checkpoints_have_it(moe_topk):
    shape = {"vocab_size": 8, "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 1, "num_key_value_heads": 1, "head_dim": 8}
    config = HunYuanMoEV1Config(**shape, **heads, num_experts=4, moe_topk=moe_topk, pad_token_id=0, eos_token_id=1)
    assert find_moe_layers(HunYuanMoEV1ForCausalLM(config)).num_experts_per_tok == 2


def test_layers_whose_tokens_use_different_numbers_of_experts_are_refused():
    shape = {"vocab_size": 8, "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 1, "num_key_value_heads": 1, "head_dim": 8}
    config = HunYuanMoEV1Config(**shape, **heads, num_experts=4, moe_topk=[1, 2], pad_token_id=0, eos_token_id=1)
    with pytest.raises(InputError, match="and of experts per token"):
        find_moe_layers(HunYuanMoEV1ForCausalLM(config))


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.int8])
def test_experts_kept_as_codes_are_found_but_not_taken_for_weights(dtype):
    model = build("mixtral")
    experts = model.model.layers[0].mlp.experts
    codes = nn.Parameter(experts.down_proj.detach().to(dtype), requires_grad=False)
    experts.register_parameter("down_proj", codes)
    experts.register_parameter("down_proj_scale_inv", nn.Parameter(torch.ones(NUM_EXPERTS, 1, 1)))
    layers = find_moe_layers(model)
    assert layers.num_experts == NUM_EXPERTS
    with pytest.raises(InputError, match=f"quantised, as {dtype} codes.*cannot be trained"):
        layers[0].expert_tensors()


@pytest.mark.parametrize("unwrap", [False, True])
@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.*:FutureWarning")
def test_a_model_that_peft_has_wrapped_is_refused_also_inside_until_it_is_merged(unwrap):
    from peft import LoraConfig, get_peft_model

    wrapped = get_peft_model(build("olmoe"), LoraConfig(r=2, target_modules=["q_proj"]))
    with pytest.raises(InputError, match=r"of PEFT.*merge_and_unload"):
        find_moe_layers(wrapped.base_model.model if unwrap else wrapped)
    assert find_moe_layers(wrapped.merge_and_unload()).layers == (0, 1)


def counted(model, rows):
    with counting(model) as counter:
        return count_rows(model, counter, rows, pad_id=0)[0]


def test_offloaded_experts_can_be_counted_and_are_refused_by_name_for_everything_else(tmp_path):
    from accelerate import dispatch_model

    model, ids = build("olmoe"), token_ids(1, 5)
    mask_LE = np.ones((2, NUM_EXPERTS), dtype=bool)
    expected = counted(model, rows := some_rows((3, 2)))
    places = dict.fromkeys(("model.embed_tokens", "model.layers.0", "model.norm", "model.rotary_emb", "lm_head"), "cpu")
    offloaded = dispatch_model(model, places | {"model.layers.1": "disk"}, main_device="cpu", offload_dir=tmp_path)
    assert np.array_equal(counted(offloaded, rows), expected)
    with pytest.raises(InputError, match="weights are offloaded"), route_through(offloaded, mask_LE):
        offloaded(ids)
    with pytest.raises(InputError, match="weights are offloaded"):
        find_moe_layers(offloaded)[1].tensors_of(0)
