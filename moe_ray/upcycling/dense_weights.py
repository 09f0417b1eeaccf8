"""The parts of a dense Llama checkpoint, and how they are put around the experts that are made of its MLPs.

Shape suffixes: I intermediate size, H hidden size, V vocabulary.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel

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


class DenseMLP(NamedTuple):
    """A gated MLP: `down(act(gate(x)) * up(x))`."""

    gate_IH: Tensor
    up_IH: Tensor
    down_HI: Tensor


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


def shared_settings(dense: PreTrainedConfig) -> dict[str, Any]:
    """The dense model's shapes, positions and token ids, by the names that the MoE families made of it have for them."""
    return {name: copy.deepcopy(getattr(dense, name)) for name in _SHARED_FIELDS}


def moe_state(
    dense: Mapping[str, Tensor], config: PreTrainedConfig, experts_of: Callable[[int, DenseMLP], Mapping[str, Tensor]]
) -> dict[str, Tensor]:
    """The MoE's state dict: copies of everything but the MLPs, and what they were made into.

    Args:
        dense: state dict of a LlamaForCausalLM.
        config: of the MoE.
        experts_of: what becomes of a layer's MLP: tensors by name, inside that decoder layer.

    Raises:
        InputError: weights are missing, or there are some that have no place.
    """
    rest = dict(dense)
    state: dict[str, Tensor] = {}
    try:
        for layer in range(config.num_hidden_layers):
            prefix = f"model.layers.{layer}."
            for name in _ATTENTION_AND_NORMS:
                state[prefix + name] = rest.pop(prefix + name).clone()
            mlp = DenseMLP(*(rest.pop(f"{prefix}mlp.{name}_proj.weight") for name in ("gate", "up", "down")))
            state |= {prefix + name: tensor for name, tensor in experts_of(layer, mlp).items()}
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
            f"dense model: got {len(rest)} weights that the MoE has no place for ({', '.join(sorted(rest)[:3])}), expected "
            "those of LlamaForCausalLM; merge adapters and dequantise first"
        )
    return state


def moe_of(
    kind: type[PreTrainedModel], dense: PreTrainedModel, config: PreTrainedConfig, state: Mapping[str, Tensor]
) -> Any:
    """The MoE with these weights, in evaluation mode, with dtype, device and generation configuration of `dense`."""
    moe: Any = kind.from_pretrained(None, config=config, state_dict=state, dtype=dense.dtype)
    moe.to(dense.device).eval()
    if dense.generation_config is not None:
        moe.generation_config = copy.deepcopy(dense.generation_config)
    return moe


def check_expert_numbers(num_experts: int, num_experts_per_tok: int) -> None:
    """Refuses numbers that do not fit each other.

    Raises:
        InputError: not 1 <= num_experts_per_tok <= num_experts.
    """
    if not 1 <= num_experts_per_tok <= num_experts:
        raise InputError(
            f"num_experts_per_tok: got {num_experts_per_tok} with num_experts {num_experts}, expected "
            "1 <= num_experts_per_tok <= num_experts; lower num_experts_per_tok or raise num_experts"
        )
