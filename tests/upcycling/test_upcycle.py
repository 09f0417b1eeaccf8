"""Upcycling keeps the dense model's function, and says clearly what it cannot upcycle."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from dense_checkpoints import LOGIT_TOLERANCE, logits, make_dense
from transformers import AutoModelForCausalLM, MixtralForCausalLM, OlmoeConfig, OlmoeForCausalLM

from moe_ray.errors import InputError
from moe_ray.upcycling.upcycle import upcycle

LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}


def routers(model: MixtralForCausalLM) -> torch.Tensor:
    return torch.stack([weight for name, weight in model.named_parameters() if name.endswith("mlp.gate.weight")])


@pytest.mark.parametrize(
    "overrides",
    [
        pytest.param({}, id="plain"),
        pytest.param({"tie_word_embeddings": True}, id="tied embeddings"),
        pytest.param({"num_key_value_heads": 2}, id="grouped-query attention"),
        pytest.param({"num_key_value_heads": 1, "head_dim": 16}, id="own head size"),
        pytest.param({"rope_parameters": LLAMA3_ROPE}, id="llama 3 rope scaling"),
        pytest.param({"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0}}, id="linear rope"),
        pytest.param({"hidden_act": "gelu"}, id="other activation"),
    ],
)
def test_logits_equal_the_dense_models(overrides: dict[str, Any]) -> None:
    dense = make_dense(**overrides)
    moe = upcycle(dense, num_experts=4, num_experts_per_tok=2, seed=0)
    torch.testing.assert_close(logits(moe), logits(dense), atol=LOGIT_TOLERANCE, rtol=0)


@pytest.mark.parametrize(("num_experts", "num_experts_per_tok"), [(1, 1), (4, 1), (4, 4), (16, 3)])
def test_logits_equal_for_any_number_of_experts(num_experts: int, num_experts_per_tok: int) -> None:
    dense = make_dense()
    moe = upcycle(dense, num_experts=num_experts, num_experts_per_tok=num_experts_per_tok, seed=0)
    torch.testing.assert_close(logits(moe), logits(dense), atol=LOGIT_TOLERANCE, rtol=0)


@pytest.mark.parametrize("tied", [False, True])
def test_from_pretrained_returns_the_same_model(tmp_path: Path, tied: bool) -> None:
    moe = upcycle(make_dense(tie_word_embeddings=tied), num_experts=4, num_experts_per_tok=2, seed=0)
    moe.save_pretrained(tmp_path)
    reloaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert isinstance(reloaded, MixtralForCausalLM)
    assert torch.equal(logits(reloaded), logits(moe))


def test_the_dense_model_is_unchanged_and_shares_no_memory() -> None:
    dense = make_dense(tie_word_embeddings=True)
    before = logits(dense)
    moe = upcycle(dense, num_experts=4, num_experts_per_tok=2, seed=0)
    with torch.no_grad():
        for parameter in moe.parameters():
            parameter.zero_()
    assert torch.equal(logits(dense), before)


def test_experts_are_independent_copies() -> None:
    dense = make_dense()
    moe = upcycle(dense, num_experts=4, num_experts_per_tok=2, seed=0)
    experts = moe.model.layers[1].mlp.experts
    with torch.no_grad():
        experts.down_proj[0].zero_()
    assert torch.equal(experts.down_proj[1], dense.model.layers[1].mlp.down_proj.weight)


def test_weights_of_the_routed_experts_sum_to_one() -> None:
    moe = upcycle(make_dense(), num_experts=8, num_experts_per_tok=3, seed=0)
    seen: list[torch.Tensor] = []
    for layer in moe.model.layers:
        layer.mlp.experts.register_forward_pre_hook(lambda _, args: seen.append(args[2].sum(-1)))
    logits(moe)
    assert len(seen) == 2
    torch.testing.assert_close(torch.cat(seen), torch.ones(2 * 128), atol=1e-6, rtol=0)


def test_routing_depends_on_the_input() -> None:
    moe = upcycle(make_dense(), num_experts=8, num_experts_per_tok=2, seed=0)
    seen: list[torch.Tensor] = []
    for layer in moe.model.layers:
        layer.mlp.experts.register_forward_pre_hook(lambda _, args: seen.append(args[1].unique()))
    logits(moe)
    assert all(len(experts) == 8 for experts in seen)


def test_router_rows_have_norm_one_and_differ_by_layer() -> None:
    weights = routers(upcycle(make_dense(), num_experts=8, num_experts_per_tok=2, seed=0))
    torch.testing.assert_close(weights.norm(dim=-1), torch.ones(2, 8), atol=1e-6, rtol=0)
    assert not torch.equal(weights[0], weights[1])


def test_routers_follow_the_seed_and_nothing_else() -> None:
    dense = make_dense()
    first, again, other = (upcycle(dense, num_experts=4, num_experts_per_tok=2, seed=seed) for seed in (0, 0, 1))
    assert torch.equal(routers(first), routers(again))
    assert not torch.equal(routers(first), routers(other))


def test_upcycling_leaves_the_global_generator_alone() -> None:
    dense = make_dense()
    before = torch.get_rng_state()
    upcycle(dense, num_experts=4, num_experts_per_tok=2, seed=0)
    assert torch.equal(torch.get_rng_state(), before)


def test_dtype_and_generation_settings_are_kept() -> None:
    dense: Any = make_dense().to(torch.bfloat16)
    dense.generation_config.eos_token_id = [2, 5]
    moe = upcycle(dense, num_experts=2, num_experts_per_tok=1, seed=0)
    assert {parameter.dtype for parameter in moe.parameters()} == {torch.bfloat16}
    assert moe.generation_config is not dense.generation_config
    assert moe.generation_config.eos_token_id == [2, 5]


@pytest.mark.parametrize("num_experts_per_tok", [0, 5])
def test_an_impossible_number_of_routed_experts_is_refused(num_experts_per_tok: int) -> None:
    with pytest.raises(InputError, match=f"num_experts_per_tok: got {num_experts_per_tok} with num_experts 4"):
        upcycle(make_dense(), num_experts=4, num_experts_per_tok=num_experts_per_tok, seed=0)


@pytest.mark.parametrize("bias", ["attention_bias", "mlp_bias"])
def test_biases_are_refused(bias: str) -> None:
    with pytest.raises(InputError, match=f"got {bias}=True"):
        upcycle(make_dense(**{bias: True}), num_experts=4, num_experts_per_tok=2, seed=0)


def test_a_model_that_is_no_llama_is_refused() -> None:
    config = OlmoeConfig(
        vocab_size=64,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_experts=2,
        eos_token_id=2,
    )
    with pytest.raises(InputError, match="got model_type 'olmoe', expected 'llama'"):
        upcycle(OlmoeForCausalLM(config), num_experts=4, num_experts_per_tok=2, seed=0)


def test_weights_without_a_place_are_refused() -> None:
    dense = make_dense()
    dense.model.layers[0].mlp.register_parameter("adapter", torch.nn.Parameter(torch.zeros(2)))
    with pytest.raises(InputError, match=r"got 1 weights that the MoE has no place for .*mlp\.adapter"):
        upcycle(dense, num_experts=4, num_experts_per_tok=2, seed=0)


def test_a_model_without_language_head_is_refused() -> None:
    with pytest.raises(InputError, match="got no weight"):
        upcycle(make_dense().model, num_experts=4, num_experts_per_tok=2, seed=0)
