"""Groups of parameters are found by structure, and some of one are about as many numbers as was asked for."""

import pytest
import torch
from families import SOME_FAMILIES, shared
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from moe_ray.errors import InputError
from moe_ray.finetuning.parameter_groups import nearest_in_number, parameters_of
from moe_ray.models.moe_layers import find_moe_layers


@pytest.mark.parametrize("family", SOME_FAMILIES)
def test_attention_and_routers_are_apart_from_each_other_and_from_the_experts(family):
    model = shared(family)
    attention, router = parameters_of(model, "attention"), parameters_of(model, "router")
    experts = {id(tensor) for layer in find_moe_layers(model) for tensor in layer.experts.parameters()}
    chosen = [id(tensor) for tensor in [*attention.values(), *router.values()]]
    assert len(chosen) == len(set(chosen))
    assert not experts & set(chosen)
    assert any("q_proj" in name or "q_a_proj" in name for name in attention)
    assert not any("layernorm" in name for name in attention if "attn" not in name)


@pytest.mark.parametrize("family", SOME_FAMILIES)
def test_every_layer_with_experts_has_its_router(family):
    model = shared(family)
    router = {id(tensor) for tensor in parameters_of(model, "router").values()}
    for layer in find_moe_layers(model):
        assert any(id(tensor) in router for tensor in layer.router.parameters(recurse=False))


def test_all_are_all():
    model = shared("olmoe")
    assert list(parameters_of(model, "all")) == [name for name, _ in model.named_parameters()]


def test_a_model_without_attention_is_refused():
    with pytest.raises(InputError, match="leave attention_only out"):
        parameters_of(nn.Linear(2, 2), "attention")


def parameters(sizes):
    return {str(number): nn.Parameter(torch.zeros(size)) for number, size in enumerate(sizes)}


@settings(max_examples=60)
@given(st.lists(st.integers(1, 50), min_size=1, max_size=20), st.integers(1, 1000))
def test_the_sum_is_off_by_at_most_half_a_tensor(sizes, target):
    chosen = nearest_in_number(parameters(sizes), target)
    taken = [tensor.numel() for tensor in chosen.values()]
    left_out = [size for number, size in enumerate(sizes) if str(number) not in chosen]
    assert taken
    if left_out:
        assert target - sum(taken) <= min(left_out) / 2
    if len(taken) > 1:
        assert sum(taken) - target <= max(taken) / 2


def test_what_is_taken_is_spread_over_the_model():
    chosen = nearest_in_number(parameters([10] * 16), 40)
    assert sorted(map(int, chosen)) == [0, 4, 8, 12]


def test_too_few_are_all_taken():
    assert len(nearest_in_number(parameters([3, 4, 5]), 100)) == 3
