"""Dense MLPs split into experts: a dense Llama checkpoint becomes a MoE whose experts differ from the start.

Every expert is a slice of a layer's intermediate neurons, and no neuron is in two of them, so all experts together are the
dense MLP. A router per layer is fitted on calibration text to tell which experts would add most to a token's output; the
k of them that it names are summed, and the rest of the MLP is left out. How much that costs falls with k, to nothing at
k = all, and is measured, never assumed: see `choose_k`.

The MoE has GraniteMoE's format, since there a router chooses by its logits and only then turns those of the chosen into
weights by softmax: with logits as small as `ROUTER_NORM` makes them every chosen expert has weight 1/k, to the last bit,
while their order is kept; with `down_proj` times k the sum is that of the slices. Families whose softmax comes before the
choice (Mixtral, Qwen, OLMoE) could not have both, as logits so small would tie. Under a mask that leaves at least k experts
each still has weight 1/k; one that leaves m < k gives each 1/m, so what is left is scaled up by k/m.

Source: MoEfication (Zhang et al. 2022, arXiv 2110.01786) for slices and co-activation; LLaMA-MoE (Zhu et al. 2024) for gated
MLPs and the scaling. Deviations: nothing is trained afterwards, and the router is linear, fitted by ridge regression.

Shape suffixes: L layers, E experts, I neurons, T tokens, H hidden size.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import GraniteMoeConfig, GraniteMoeForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.activations import ACT2FN

from moe_ray.errors import InputError
from moe_ray.upcycling.dense_weights import (
    DenseMLP,
    check_expert_numbers,
    moe_of,
    moe_state,
    require_llama,
    shared_settings,
)
from moe_ray.upcycling.neuron_groups import balanced_groups, co_activation

ROUTER_NORM = 1e-12
"""Length of a router's longest row: exp of such logits is 1 in single precision, and all of them are far from denormal."""

_RIDGE = 0.03
"""Of the mean diagonal of the inputs' second moments."""

_MAX_FEATURES = 1024
"""Tokens that neurons are grouped by; more of them make hardly another grouping and take longer."""

_SLICE_MULTIPLE = 8
"""Neurons: rows of 16 bytes in half precision, which the library's grouped products want."""


@dataclass(frozen=True, kw_only=True)
class SplitPlan:
    """Which neurons are an expert, and how a layer's router tells experts apart.

    Attributes:
        experts_LI: the expert of every neuron.
        routers_LEH: a layer's logits are this times the MLP's input.
    """

    experts_LI: Tensor
    routers_LEH: Tensor

    @property
    def num_experts(self) -> int:
        """Of a layer."""
        return self.routers_LEH.shape[1]


def plan_split(
    dense: PreTrainedModel, calibration: Sequence[Sequence[int]], *, num_experts: int, seed: int
) -> SplitPlan:
    """Groups the neurons of every layer and fits its router.

    Args:
        dense: a Llama-type causal LM in float32, in evaluation mode.
        calibration: token ids of texts such as the MoE will meet: some thousand tokens.
        num_experts: per layer; cuts the intermediate size into slices of a multiple of 8.
        seed: of the grouping.

    Raises:
        InputError: the numbers do not fit, `dense` is no Llama model without biases, or there is no calibration text.
    """
    check_split_numbers(dense.config, num_experts)
    if not any(calibration):
        raise InputError("calibration: got no token, expected some thousand; give prompts to calibrate on")
    experts, routers = [], []
    for layer, (mlp, input_TH) in enumerate(_mlp_inputs(dense, calibration)):
        contribution_TI = _contributions(dense.config, mlp, input_TH)
        picked_T = torch.linspace(0, len(input_TH) - 1, min(len(input_TH), _MAX_FEATURES)).long()
        experts_I = balanced_groups(co_activation(contribution_TI[picked_T]), num_experts, seed=seed + layer)
        output_norm_TE = _output_norms(dense.config, mlp, input_TH, experts_I, num_experts)
        experts.append(experts_I)
        routers.append(_fit_router(input_TH, output_norm_TE))
    return SplitPlan(experts_LI=torch.stack(experts), routers_LEH=torch.stack(routers))


def check_split_numbers(dense: PreTrainedConfig, num_experts: int) -> None:
    """Refuses a model that cannot be split into so many experts, before anything is computed.

    Raises:
        InputError: the number does not cut the intermediate size so, or it is no Llama model without biases.
    """
    require_llama(dense)
    size = dense.intermediate_size
    if num_experts < 2 or size % (num_experts * _SLICE_MULTIPLE):
        fitting = [number for number in range(2, min(size, 129)) if not size % (number * _SLICE_MULTIPLE)]
        raise InputError(
            f"num_experts: got {num_experts}, expected one that cuts the intermediate size of {size} into slices of a "
            f"multiple of {_SLICE_MULTIPLE}: one of {fitting}"
        )


def split(dense: PreTrainedModel, plan: SplitPlan, *, num_experts_per_tok: int) -> GraniteMoeForCausalLM:
    """Builds the GraniteMoE-format MoE of a plan; with as many experts per token as there are it is the dense model.

    Args:
        dense: the model that the plan was made of, in any floating dtype; left unchanged.
        plan: from `plan_split`.
        num_experts_per_tok: routed experts per token, the router's k.

    Returns:
        the MoE in evaluation mode, with the dtype, device and generation configuration of `dense`.

    Raises:
        InputError: the numbers do not fit.
    """
    check_expert_numbers(plan.num_experts, num_experts_per_tok)
    config = granite_config(dense.config, num_experts=plan.num_experts, num_experts_per_tok=num_experts_per_tok)

    def experts_of(layer: int, mlp: DenseMLP) -> dict[str, Tensor]:
        neurons_EI = _neurons(plan.experts_LI[layer], plan.num_experts).to(mlp.gate_IH.device)
        gate_EIH, up_EIH = mlp.gate_IH[neurons_EI], mlp.up_IH[neurons_EI]
        down_EHI = mlp.down_HI[:, neurons_EI].transpose(0, 1) * num_experts_per_tok
        return {
            "block_sparse_moe.experts.gate_up_proj": torch.cat((gate_EIH, up_EIH), dim=1),
            "block_sparse_moe.experts.down_proj": down_EHI.contiguous(),
            "block_sparse_moe.router.weight": plan.routers_LEH[layer].to(mlp.gate_IH),
        }

    moe = moe_of(GraniteMoeForCausalLM, dense, config, moe_state(dense.state_dict(), config, experts_of))
    assert isinstance(moe, GraniteMoeForCausalLM)
    return moe


def granite_config(dense: PreTrainedConfig, *, num_experts: int, num_experts_per_tok: int) -> GraniteMoeConfig:
    """The GraniteMoE configuration with the dense model's shapes, positions and token ids, its own multipliers off."""
    shared = shared_settings(dense)
    head_dim = shared["head_dim"] or dense.hidden_size // dense.num_attention_heads
    shared |= {"intermediate_size": dense.intermediate_size // num_experts, "head_dim": head_dim}
    return GraniteMoeConfig(
        **shared,
        num_local_experts=num_experts,
        num_experts_per_tok=num_experts_per_tok,
        attention_multiplier=head_dim**-0.5,
        embedding_multiplier=1.0,
        residual_multiplier=1.0,
        logits_scaling=1.0,
        output_router_logits=False,
    )


@torch.no_grad()
def route_to_all(moe: GraniteMoeForCausalLM) -> None:
    """Lets every token of a split model use all experts, in place: it computes what the dense model computed."""
    num_experts, used = moe.config.num_local_experts, moe.config.num_experts_per_tok
    for layer in moe.model.layers:
        layer.block_sparse_moe.router.top_k = num_experts
        layer.block_sparse_moe.experts.down_proj *= num_experts / used
    moe.config.num_experts_per_tok = num_experts


@torch.no_grad()
def _mlp_inputs(dense: PreTrainedModel, texts: Sequence[Sequence[int]]) -> Iterator[tuple[Any, Tensor]]:
    """Every layer's MLP with its inputs (T, H) on all tokens of the texts, layer after layer."""
    layers = dense.model.layers
    inputs: list[list[Tensor]] = [[] for _ in layers]
    hooks = [
        layer.mlp.register_forward_pre_hook(lambda _, args, kept=kept: kept.append(args[0].flatten(0, 1)))
        for layer, kept in zip(layers, inputs, strict=True)
    ]
    try:
        for ids in texts:
            if ids:
                dense.model(input_ids=torch.tensor([list(ids)], device=dense.device), use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()
    for layer, kept in zip(layers, inputs, strict=True):
        yield layer.mlp, torch.cat(kept).float()
        kept.clear()


@torch.no_grad()
def _activations(config: PreTrainedConfig, mlp: Any, input_TH: Tensor) -> Tensor:
    activated_TI: Tensor = ACT2FN[config.hidden_act](mlp.gate_proj(input_TH)) * mlp.up_proj(input_TH)
    return activated_TI


def _contributions(config: PreTrainedConfig, mlp: Any, input_TH: Tensor) -> Tensor:
    """(T, I) length of what each neuron adds to the MLP's output."""
    norms_I: Tensor = mlp.down_proj.weight.detach().norm(dim=0)
    return _activations(config, mlp, input_TH).abs() * norms_I


@torch.no_grad()
def _output_norms(config: PreTrainedConfig, mlp: Any, input_TH: Tensor, experts_I: Tensor, num_experts: int) -> Tensor:
    """(T, E) length of what each expert adds to the MLP's output."""
    activated_TI, down_HI = _activations(config, mlp, input_TH), mlp.down_proj.weight
    norms = [(activated_TI[:, own] @ down_HI[:, own].T).norm(dim=1) for own in _neurons(experts_I, num_experts)]
    return torch.stack(norms, dim=1)


@torch.no_grad()
def _fit_router(input_TH: Tensor, output_norm_TE: Tensor) -> Tensor:
    """(E, H) of which the products with an input rank the experts by what they add, as well as a linear map can."""
    # Which of a token's experts are above its others is all that counts, and logarithms make that alike for all tokens.
    target_TE = output_norm_TE.clamp_min(torch.finfo(torch.float32).tiny).log()
    target_TE = target_TE - target_TE.mean(dim=1, keepdim=True)
    moments_HH = input_TH.T @ input_TH
    moments_HH += _RIDGE * moments_HH.diagonal().mean() * torch.eye(len(moments_HH))
    router_EH: Tensor = torch.linalg.solve(moments_HH, input_TH.T @ target_TE).T
    scaled_EH: Tensor = router_EH * (ROUTER_NORM / router_EH.norm(dim=1).max())
    return scaled_EH


def _neurons(experts_I: Tensor, num_experts: int) -> Tensor:
    """(E, I/E) the neurons of every expert, ascending."""
    return torch.argsort(experts_I, stable=True).view(num_experts, -1)
