"""A split model is its dense model cut in pieces: all of them together compute the same, and a router tells them apart."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from dense_checkpoints import LOGIT_TOLERANCE, TOKENS, logits, make_dense
from transformers import AutoModelForCausalLM, GraniteMoeSharedForCausalLM, LlamaForCausalLM

from moe_ray.errors import InputError
from moe_ray.models.expert_copies import experts_are_copies
from moe_ray.models.moe_layers import find_moe_layers
from moe_ray.routing.masking import route_through
from moe_ray.upcycling.split import SHARED, plan_split, route_to_all, split
from moe_ray.upcycling.upcycle import upcycle

LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
EXPERTS = 6


def some_text(rows: int = 8, length: int = 60, seed: int = 3) -> list[list[int]]:
    ids = torch.randint(3, len(TOKENS), (rows, length), generator=torch.Generator().manual_seed(seed))
    return [row.tolist() for row in ids]


def make_split(
    dense: LlamaForCausalLM, k: int, *, num_experts: int = EXPERTS, shared: float = 0.0, seed: int = 0
) -> GraniteMoeSharedForCausalLM:
    plan = plan_split(dense, some_text(), num_experts=num_experts, shared=shared, seed=seed)
    return split(dense, plan, num_experts_per_tok=k)


def routed(moe: GraniteMoeSharedForCausalLM) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Experts and weights of every layer's tokens."""
    seen: list[tuple[torch.Tensor, torch.Tensor]] = []
    hooks = [
        layer.block_sparse_moe.experts.register_forward_pre_hook(lambda _, args: seen.append((args[1], args[2])))
        for layer in moe.model.layers
    ]
    logits(moe)
    for hook in hooks:
        hook.remove()
    return seen


@pytest.mark.slow
@pytest.mark.parametrize(
    "overrides",
    [
        pytest.param({}, id="plain"),
        pytest.param({"tie_word_embeddings": True}, id="tied embeddings"),
        pytest.param({"num_key_value_heads": 2}, id="grouped-query attention"),
        pytest.param({"num_key_value_heads": 1, "head_dim": 16}, id="own head size"),
        pytest.param({"rope_parameters": LLAMA3_ROPE}, id="llama 3 rope scaling"),
        pytest.param({"hidden_act": "gelu"}, id="other activation"),
    ],
)
def test_all_experts_together_are_the_dense_model(overrides: dict[str, Any]) -> None:
    dense = make_dense(**overrides)
    torch.testing.assert_close(logits(make_split(dense, EXPERTS)), logits(dense), atol=LOGIT_TOLERANCE, rtol=0)


@pytest.mark.parametrize("k", [1, 4])
def test_a_model_of_fewer_experts_per_token_can_be_let_use_all_of_them(k: int) -> None:
    dense = make_dense()
    moe = make_split(dense, k)
    assert (logits(moe) - logits(dense)).abs().max() > 100 * LOGIT_TOLERANCE
    route_to_all(moe)
    torch.testing.assert_close(logits(moe), logits(dense), atol=LOGIT_TOLERANCE, rtol=0)


def test_every_neuron_is_in_exactly_one_expert() -> None:
    dense = make_dense()
    moe = make_split(dense, 2)
    for before, after in zip(dense.model.layers, moe.model.layers, strict=True):
        experts = after.block_sparse_moe.experts
        rows = torch.cat((before.mlp.gate_proj.weight, before.mlp.up_proj.weight), dim=1)
        slices = torch.cat(experts.gate_up_proj.chunk(2, dim=1), dim=2).flatten(0, 1)
        assert sorted(map(tuple, rows.tolist())) == sorted(map(tuple, slices.tolist()))


def test_every_routed_expert_has_the_same_weight_and_the_choice_varies() -> None:
    moe = make_split(make_dense(), 2)
    for index, weights in routed(moe):
        assert torch.equal(weights, torch.full_like(weights, 0.5))
        load = torch.bincount(index.flatten(), minlength=EXPERTS) / len(index)
        assert load.min() > 0.02
        assert load.max() < 0.98


def test_the_order_of_experts_survives_bfloat16() -> None:
    dense = make_dense()
    moe = make_split(dense, 2)
    exact = routed(moe)
    for (index, _), (rounded, weights) in zip(exact, routed(moe.to(torch.bfloat16)), strict=True):
        agree = (index.sort(dim=1).values == rounded.sort(dim=1).values).float().mean()
        assert agree > 0.9
        assert torch.equal(weights, torch.full_like(weights, 0.5))


def test_the_router_finds_the_experts_that_add_most() -> None:
    dense = make_dense()
    plan = plan_split(dense, some_text(rows=40), num_experts=EXPERTS, shared=0, seed=0)
    mlp, x = dense.model.layers[0].mlp, []
    hook = mlp.register_forward_pre_hook(lambda _, args: x.append(args[0].flatten(0, 1)))
    logits(dense)
    hook.remove()
    with torch.no_grad():
        activated = torch.nn.functional.silu(mlp.gate_proj(x[0])) * mlp.up_proj(x[0])
        norms = torch.stack(
            [
                (activated[:, own] @ mlp.down_proj.weight[:, own].T).norm(dim=1)
                for own in (plan.experts_LI[0] == expert for expert in range(EXPERTS))
            ],
            dim=1,
        )
        chosen = (x[0] @ plan.routers_LEH[0].T).topk(3, dim=1).indices
        share = norms.gather(1, chosen).sum() / norms.sum()
        best = norms.topk(3, dim=1).values.sum() / norms.sum()
    assert share > 0.5 + 0.5 * (
        best - 0.5
    )  # half of what there is to be had above chance, on text it was not fitted on


@pytest.mark.parametrize("tied", [False, True])
def test_from_pretrained_returns_the_same_model(tmp_path: Path, tied: bool) -> None:
    moe = make_split(make_dense(tie_word_embeddings=tied, num_key_value_heads=1, head_dim=16), 2)
    moe.save_pretrained(tmp_path)
    reloaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert isinstance(reloaded, GraniteMoeSharedForCausalLM)
    assert torch.equal(logits(reloaded), logits(moe))


def test_a_mask_over_enough_experts_leaves_their_weights_alone() -> None:
    moe = make_split(make_dense(), 2)
    mask_LE = np.ones((2, EXPERTS), dtype=bool)
    mask_LE[:, :2] = False
    with route_through(moe, mask_LE):
        for index, weights in routed(moe):
            assert index.min() >= 2
            assert torch.equal(weights, torch.full_like(weights, 0.5))


def test_experts_of_a_split_model_differ_and_those_of_the_other_way_do_not() -> None:
    dense = make_dense()
    assert not experts_are_copies(make_split(dense, 2))
    assert experts_are_copies(upcycle(dense, num_experts=4, num_experts_per_tok=2, seed=0))


def test_moe_ray_finds_layers_experts_and_routers() -> None:
    layers = find_moe_layers(make_split(make_dense(), 2))
    assert (layers.layers, layers.num_experts, layers.num_experts_per_tok) == ((0, 1), EXPERTS, 2)


def test_the_dense_model_is_unchanged_and_shares_no_memory() -> None:
    dense = make_dense(tie_word_embeddings=True)
    before = logits(dense)
    moe = make_split(dense, 2)
    with torch.no_grad():
        for parameter in moe.parameters():
            parameter.zero_()
    assert torch.equal(logits(dense), before)


def test_the_split_follows_its_seed_and_leaves_the_global_generator_alone() -> None:
    dense = make_dense()
    before = torch.get_rng_state()
    first, again, other = (
        plan_split(dense, some_text(), num_experts=EXPERTS, shared=0, seed=seed).experts_LI for seed in (0, 0, 7)
    )
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize(("num_experts", "shared", "most"), [(1, 0, 6), (7, 0, 6), (4, 0.5, 3)])
def test_a_number_of_experts_that_does_not_fit_is_refused(num_experts: int, shared: float, most: int) -> None:
    with pytest.raises(InputError, match=rf"num_experts: got {num_experts}, expected 2 to {most}, since 48 neurons"):
        plan_split(make_dense(), some_text(), num_experts=num_experts, shared=shared, seed=0)


@pytest.mark.parametrize("shared", [-0.1, 1.0])
def test_a_share_that_is_none_is_refused(shared: float) -> None:
    with pytest.raises(InputError, match=f"shared: got {shared:g}"):
        plan_split(make_dense(), some_text(), num_experts=2, shared=shared, seed=0)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("num_experts", "shared", "num_shared"), [(2, 0.5, 32), (3, 0.5, 24), (5, 0.0, 8), (2, 0.6, 32)]
)
def test_what_does_not_fit_into_slices_is_shared_and_all_together_are_the_dense_model(
    num_experts: int, shared: float, num_shared: int
) -> None:
    dense = make_dense()
    moe = make_split(dense, 1, num_experts=num_experts, shared=shared)
    assert moe.config.shared_intermediate_size == num_shared
    assert moe.model.layers[0].shared_mlp.output_linear.weight.shape == (32, num_shared)
    route_to_all(moe)
    torch.testing.assert_close(logits(moe), logits(dense), atol=LOGIT_TOLERANCE, rtol=0)


def test_the_shared_neurons_are_those_that_add_most_to_a_token_s_output_on_average() -> None:
    dense, rows = make_dense(), some_text()
    plan = plan_split(dense, rows, num_experts=3, shared=0.5, seed=0)
    mlp, x = dense.model.layers[0].mlp, []
    hook = mlp.register_forward_pre_hook(lambda _, args: x.append(args[0].flatten(0, 1)))
    with torch.no_grad():
        dense(torch.tensor(rows))
        lengths = mlp.down_proj.weight.norm(dim=0)
        added = (torch.nn.functional.silu(mlp.gate_proj(x[0])) * mlp.up_proj(x[0])).abs() * lengths
    hook.remove()
    importance = (added / added.norm(dim=1, keepdim=True)).square().mean(dim=0)
    is_shared = plan.experts_LI[0] == SHARED
    assert importance[is_shared].min() >= 0.999 * importance[~is_shared].max()


def test_more_experts_per_token_than_there_are_is_refused() -> None:
    with pytest.raises(InputError, match="num_experts_per_tok: got 7 with num_experts 6"):
        make_split(make_dense(), 7)


@pytest.mark.parametrize("texts", [[], [[], []]])
def test_no_calibration_text_is_refused(texts: list[list[int]]) -> None:
    with pytest.raises(InputError, match="calibration: got no token"):
        plan_split(make_dense(), texts, num_experts=EXPERTS, shared=0, seed=0)
