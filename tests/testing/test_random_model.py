"""The random model of the benchmarks routes tokens apart."""

import torch
from transformers import OlmoeConfig

from moe_ray.models.moe_layers import find_moe_layers
from moe_ray.routing.counter import counting
from moe_ray.testing.random_model import random_model

CONFIG = OlmoeConfig(
    vocab_size=50,
    hidden_size=16,
    intermediate_size=8,
    num_hidden_layers=2,
    num_attention_heads=2,
    num_experts=8,
    num_experts_per_tok=2,
    eos_token_id=2,
)


def make(seed=0):
    return random_model(CONFIG, device="cpu", dtype=torch.float32, experts_implementation="eager", seed=seed)


def test_the_same_seed_gives_the_same_weights_and_another_one_others():
    first, same, other = (make(seed).state_dict() for seed in (0, 0, 1))
    assert all(torch.equal(first[name], same[name]) for name in first)
    router = next(name for name in first if name.endswith("mlp.gate.weight"))
    assert not torch.equal(first[router], other[router])


def test_tokens_are_spread_over_the_experts():
    model = make()
    assert not model.training
    with counting(model) as counter, torch.inference_mode():
        counter.start(torch.zeros(1, 40, dtype=torch.long), 1)
        model(torch.arange(3, 43).unsqueeze(0))
        counts_LE = counter.finish().numpy()[0]
    assert counts_LE.sum() == 40 * 2 * len(find_moe_layers(model))
    assert ((counts_LE > 0).sum(axis=1) >= 6).all()
