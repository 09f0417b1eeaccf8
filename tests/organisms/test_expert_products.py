"""The experts' forward of the training computes what the library's does, forwards and backwards."""

import torch
from transformers import OlmoeConfig, OlmoeForCausalLM

from moe_ray.models.moe_layers import find_moe_layers
from moe_ray.organisms.expert_products import sorted_experts


def small_model():
    torch.manual_seed(0)
    config = OlmoeConfig(
        vocab_size=50, hidden_size=16, intermediate_size=8, num_hidden_layers=2, num_attention_heads=2, num_experts=6,
        num_experts_per_tok=2, pad_token_id=0, eos_token_id=1,
    )  # fmt: skip
    model = OlmoeForCausalLM(config)
    model.set_experts_implementation("eager")
    return model


def loss_and_gradients(model):
    ids = torch.randint(2, 50, (3, 7), generator=torch.Generator().manual_seed(1))
    model.zero_grad()
    loss = model(input_ids=ids, labels=ids).loss
    torch.autograd.backward(loss)
    return loss.item(), {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


def test_losses_and_gradients_are_those_of_the_library():
    model = small_model()
    expected_loss, expected = loss_and_gradients(model)
    with sorted_experts(find_moe_layers(model)):
        loss, gradients = loss_and_gradients(model)
    assert abs(loss - expected_loss) < 1e-6
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, expected[name], atol=1e-6, rtol=1e-4)


def test_the_librarys_own_forward_is_back_afterwards():
    model = small_model()
    layers = find_moe_layers(model)
    with sorted_experts(layers):
        assert all("forward" in layer.experts.__dict__ for layer in layers)
    assert not any("forward" in layer.experts.__dict__ for layer in layers)
