"""Sparse upcycling: a dense Llama checkpoint becomes a Mixtral-format MoE with the same logits.

Every expert starts as a copy of the dense MLP and the weights of the routed experts sum to 1, so whatever the random
routers choose, the mixture returns what the MLP returned. It gives moe-ray a real instruct model with any number of
experts where no MoE checkpoint can be had.

Source: Komatsuzaki et al. 2022, "Sparse Upcycling: Training Mixture-of-Experts from Dense Checkpoints", section 3.
Deviation: every layer is upcycled, and the weights of the routed experts are normalised, which keeps the logits.

Shape suffixes: E experts, I intermediate size, H hidden size, V vocabulary.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from transformers import MixtralConfig, MixtralForCausalLM, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from moe_ray.errors import InputError

_SHARED_FIELDS = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "hidden_act",
    "max_position_embeddings",
    "initializer_range",
    "rms_norm_eps",
    "use_cache",
    "pad_token_id",
    "bos_token_id",
    "eos_token_id",
    "tie_word_embeddings",
    "attention_dropout",
    "rope_parameters",
)

_ATTENTION_AND_NORMS = (
    "self_attn.q_proj.weight",
    "self_attn.k_proj.weight",
    "self_attn.v_proj.weight",
    "self_attn.o_proj.weight",
    "input_layernorm.weight",
    "post_attention_layernorm.weight",
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
    if not 1 <= num_experts_per_tok <= num_experts:
        raise InputError(
            f"num_experts_per_tok: got {num_experts_per_tok} with num_experts {num_experts}, expected "
            "1 <= num_experts_per_tok <= num_experts; lower num_experts_per_tok or raise num_experts"
        )
    require_llama(dense.config)
    config = mixtral_config(dense.config, num_experts=num_experts, num_experts_per_tok=num_experts_per_tok)
    state = _moe_state(dense.state_dict(), config, seed)
    moe: Any = MixtralForCausalLM.from_pretrained(None, config=config, state_dict=state, dtype=dense.dtype)
    moe.to(dense.device).eval()
    if dense.generation_config is not None:
        moe.generation_config = copy.deepcopy(dense.generation_config)
    assert isinstance(moe, MixtralForCausalLM)
    return moe


def mixtral_config(dense: PreTrainedConfig, *, num_experts: int, num_experts_per_tok: int) -> MixtralConfig:
    """Returns the Mixtral configuration with the dense model's shapes, positions and token ids."""
    shared = {name: copy.deepcopy(getattr(dense, name)) for name in _SHARED_FIELDS}
    return MixtralConfig(
        **shared,
        num_local_experts=num_experts,
        num_experts_per_tok=num_experts_per_tok,
        sliding_window=None,
        output_router_logits=False,
    )


def require_llama(config: PreTrainedConfig) -> None:
    """Raises InputError unless Mixtral's layers can hold the weights of a model with this configuration."""
    if config.model_type != "llama":
        raise InputError(
            f"dense model: got model_type {config.model_type!r}, expected 'llama'; only LlamaForCausalLM checkpoints "
            "have the layers of Mixtral, choose one of those"
        )
    for name in ("attention_bias", "mlp_bias"):
        if getattr(config, name):
            raise InputError(
                f"dense model: got {name}=True, expected False; Mixtral has no biases, choose a checkpoint without them"
            )
    if getattr(config, "quantization_config", None) is not None:
        raise InputError(
            "dense model: got quantised weights (quantization_config), expected floating-point weights; "
            "dequantise the checkpoint first"
        )


def _moe_state(dense: Mapping[str, torch.Tensor], config: MixtralConfig, seed: int) -> dict[str, torch.Tensor]:
    """Returns the MoE's state dict; holds one copy of every weight, E copies of the MLPs."""
    generator = torch.Generator().manual_seed(seed)
    rest = dict(dense)
    state: dict[str, torch.Tensor] = {}
    try:
        for layer in range(config.num_hidden_layers):
            prefix = f"model.layers.{layer}."
            for name in _ATTENTION_AND_NORMS:
                state[prefix + name] = rest.pop(prefix + name).clone()
            gate_IH, up_IH, down_HI = (rest.pop(f"{prefix}mlp.{name}_proj.weight") for name in ("gate", "up", "down"))
            state[prefix + "mlp.experts.gate_up_proj"] = _copies(torch.cat((gate_IH, up_IH)), config.num_local_experts)
            state[prefix + "mlp.experts.down_proj"] = _copies(down_HI, config.num_local_experts)
            router_EH = _router(config.num_local_experts, config.hidden_size, generator)
            state[prefix + "mlp.gate.weight"] = router_EH.to(dtype=gate_IH.dtype, device=gate_IH.device)
        for name in ("model.embed_tokens.weight", "model.norm.weight"):
            state[name] = rest.pop(name).clone()
        lm_head_VH = rest.pop("lm_head.weight")
    except KeyError as error:
        raise InputError(
            f"dense model: got no weight {error}, expected the weights of LlamaForCausalLM; load it with that class"
        ) from error
    if not config.tie_word_embeddings:
        state["lm_head.weight"] = lm_head_VH.clone()
    if rest:
        raise InputError(
            f"dense model: got {len(rest)} weights Mixtral has no place for ({', '.join(sorted(rest)[:3])}), expected "
            "those of LlamaForCausalLM; merge adapters and dequantise first"
        )
    return state


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
