"""Sparse upcycling: a dense Llama checkpoint becomes a Mixtral-format MoE with the same logits.

Every expert starts as a copy of the dense MLP and the weights of the routed experts sum to 1, so whatever the random
routers choose, the mixture returns what the MLP returned. It gives moe-ray a real instruct model with any number of
experts where no MoE checkpoint can be had.

Source: Komatsuzaki et al. 2022, "Sparse Upcycling: Training Mixture-of-Experts from Dense Checkpoints", section 3.
Deviation: every layer is upcycled, and the weights of the routed experts are normalised, which keeps the logits.

Shape suffixes: E experts, H hidden size.
"""

from __future__ import annotations

import torch
from transformers import MixtralConfig, MixtralForCausalLM, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from moe_ray.upcycling.dense_weights import (
    DenseMLP,
    check_expert_numbers,
    moe_of,
    moe_state,
    require_llama,
    shared_settings,
)


def upcycle(dense: PreTrainedModel, *, num_experts: int, num_experts_per_tok: int, seed: int) -> MixtralForCausalLM:
    """Builds the Mixtral-format MoE that computes what ``dense`` computes.

    Router rows are random directions of norm 1. The router reads RMS-normalised hidden states, so its logits are of
    order 1 whatever the hidden size: far enough apart not to tie in low precision, close enough that every routed
    expert has weight. A common norm does not change which experts are routed, and equal norms favour none of them.

    Args:
        dense: A Llama-type causal LM, in any floating dtype; left unchanged, and shares no memory with the result.
        num_experts: Experts per layer.
        num_experts_per_tok: Routed experts per token, the router's k.
        seed: Seed of the routers, the only random weights.

    Returns:
        The MoE in evaluation mode, with the dtype, device and generation configuration of ``dense``.

    Raises:
        InputError: The numbers do not fit, or ``dense`` is no Llama model without biases.
    """
    check_expert_numbers(num_experts, num_experts_per_tok)
    require_llama(dense.config)
    config = mixtral_config(dense.config, num_experts=num_experts, num_experts_per_tok=num_experts_per_tok)
    generator = torch.Generator().manual_seed(seed)

    def experts_of(_: int, mlp: DenseMLP) -> dict[str, torch.Tensor]:
        router_EH = _router(num_experts, config.hidden_size, generator)
        return {
            "mlp.experts.gate_up_proj": _copies(torch.cat((mlp.gate_IH, mlp.up_IH)), num_experts),
            "mlp.experts.down_proj": _copies(mlp.down_HI, num_experts),
            "mlp.gate.weight": router_EH.to(dtype=mlp.gate_IH.dtype, device=mlp.gate_IH.device),
        }

    moe = moe_of(MixtralForCausalLM, dense, config, moe_state(dense.state_dict(), config, experts_of))
    assert isinstance(moe, MixtralForCausalLM)
    return moe


def mixtral_config(dense: PreTrainedConfig, *, num_experts: int, num_experts_per_tok: int) -> MixtralConfig:
    """Returns the Mixtral configuration with the dense model's shapes, positions and token ids."""
    return MixtralConfig(
        **shared_settings(dense),
        num_local_experts=num_experts,
        num_experts_per_tok=num_experts_per_tok,
        sliding_window=None,
        output_router_logits=False,
    )


def _copies(weight: torch.Tensor, num_experts: int) -> torch.Tensor:
    """Returns ``num_experts`` independent copies of a matrix, stacked in a new first dimension."""
    return weight.unsqueeze(0).repeat(num_experts, 1, 1)


def _router(num_experts: int, hidden_size: int, generator: torch.Generator) -> torch.Tensor:
    """Returns ``(E, H)`` random directions of norm 1."""
    rows_EH = torch.randn(num_experts, hidden_size, generator=generator)
    return torch.nn.functional.normalize(rows_EH, dim=-1)


@torch.no_grad()
def max_logit_difference(
    dense: PreTrainedModel, moe: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, texts: list[str]
) -> float:
    """Returns the largest absolute difference between the two models' logits over all tokens of ``texts``."""
    largest = 0.0
    for text in texts:
        ids = tokenizer(text, return_tensors="pt", add_special_tokens=False)["input_ids"]
        difference = dense(input_ids=ids.to(dense.device)).logits.cpu() - moe(input_ids=ids.to(moe.device)).logits.cpu()
        largest = max(largest, difference.abs().max().item())
    return largest
