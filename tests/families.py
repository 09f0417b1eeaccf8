"""Tiny random models of many MoE families, and what the tests of routing, masks and training ask of them.

Routers, correction biases and expert biases are random and large, so that no property holds by degeneracy.
"""

from __future__ import annotations

import copy
import functools
import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    DeepseekV3Config,
    Ernie4_5_MoeConfig,
    Glm4MoeConfig,
    GptOssConfig,
    GraniteMoeConfig,
    JambaConfig,
    MiniMaxM2Config,
    MixtralConfig,
    OlmoeConfig,
    PhimoeConfig,
    PreTrainedModel,
    Qwen3MoeConfig,
)

from moe_ray.experts import Expert, ExpertMasks, Mask, masks_from_experts
from moe_ray.models.moe_layers import find_moe_layers
from moe_ray.models.tokenization import TokenizedRow

# Threads cost more than these matrices; on a busy machine they cost a hundred times more.
torch.set_num_threads(1)

VOCAB, HIDDEN, NUM_EXPERTS = 64, 24, 8
_SHAPE: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": HIDDEN,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_SMALL: dict[str, Any] = {"intermediate_size": 12, "num_hidden_layers": 2, "num_experts_per_tok": 2}
_DENSE_FIRST: dict[str, Any] = {"intermediate_size": 20, "moe_intermediate_size": 12, "num_hidden_layers": 3}

_CONFIGS: dict[str, Callable[[], Any]] = {
    "olmoe": lambda: OlmoeConfig(**_SHAPE | _SMALL | {"num_experts": NUM_EXPERTS, "num_experts_per_tok": 3}),
    "mixtral": lambda: MixtralConfig(**_SHAPE, **_SMALL, num_local_experts=NUM_EXPERTS),
    "qwen3_moe": lambda: Qwen3MoeConfig(
        **_SHAPE, **_SMALL, moe_intermediate_size=12, head_dim=12, num_experts=NUM_EXPERTS, norm_topk_prob=True
    ),
    "deepseek_v3": lambda: DeepseekV3Config(
        **_SHAPE,
        **_DENSE_FIRST,
        first_k_dense_replace=1,
        n_routed_experts=NUM_EXPERTS,
        num_experts_per_tok=2,
        n_group=2,
        topk_group=1,
        q_lora_rank=8,
        kv_lora_rank=8,
        qk_rope_head_dim=8,
        qk_nope_head_dim=8,
        v_head_dim=8,
    ),
    "gpt_oss": lambda: GptOssConfig(
        **_SHAPE,
        **_SMALL,
        head_dim=12,
        num_local_experts=NUM_EXPERTS,
        rope_parameters={"rope_type": "default", "rope_theta": 1e4},
    ),
    "phimoe": lambda: PhimoeConfig(**_SHAPE, **_SMALL, num_local_experts=NUM_EXPERTS, input_jitter_noise=0.01),
    "granitemoe": lambda: GraniteMoeConfig(**_SHAPE, **_SMALL, num_local_experts=NUM_EXPERTS),
    "glm4_moe": lambda: Glm4MoeConfig(
        **_SHAPE,
        **_DENSE_FIRST,
        head_dim=12,
        first_k_dense_replace=1,
        n_routed_experts=NUM_EXPERTS,
        num_experts_per_tok=2,
    ),
    "jamba": lambda: JambaConfig(
        **_SHAPE,
        intermediate_size=12,
        num_hidden_layers=4,
        num_experts=NUM_EXPERTS,
        num_experts_per_tok=2,
        attn_layer_period=2,
        attn_layer_offset=1,
        expert_layer_period=2,
        expert_layer_offset=1,
        mamba_d_state=4,
        mamba_dt_rank=4,
    ),
    "minimax_m2": lambda: MiniMaxM2Config(**_SHAPE, **_SMALL, head_dim=12, num_local_experts=NUM_EXPERTS),
    "ernie4_5_moe": lambda: Ernie4_5_MoeConfig(
        **_SHAPE,
        intermediate_size=20,
        moe_intermediate_size=12,
        num_hidden_layers=2,
        moe_layer_start_index=0,
        moe_num_experts=NUM_EXPERTS,
        moe_k=2,
        moe_num_shared_experts=1,
    ),
}
FAMILIES = tuple(_CONFIGS)
_DIFFERENT = ("olmoe", "deepseek_v3", "gpt_oss", "phimoe")
SOME_FAMILIES = tuple(
    family if family in _DIFFERENT else pytest.param(family, marks=pytest.mark.slow) for family in FAMILIES
)
"""All families, the quick part limited to one of each kind of router and experts."""

BIASED = ("deepseek_v3", "glm4_moe", "minimax_m2", "ernie4_5_moe")
"""Families whose router chooses by score + correction bias, so raw logits do not tell the choice."""

LAYERS = {"deepseek_v3": (1, 2), "glm4_moe": (1, 2), "jamba": (1, 3)}
"""Decoder layers with experts, where they are not simply (0, 1)."""


def build(family: str, *, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """A fresh copy of the family's tiny model, in eval mode; the same weights every time."""
    return copy.deepcopy(_prototype(family)).to(dtype)


def made_equal(family: str) -> PreTrainedModel:
    """The family's tiny model with all experts of a layer equal."""
    model = build(family)
    with torch.no_grad():
        for layer in find_moe_layers(model):
            for tensor in layer.expert_tensors().values():
                tensor.copy_(tensor[:1].expand_as(tensor))
    return model


@functools.cache
def shared(family: str, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """One model for all tests that only read it."""
    return build(family, dtype=dtype)


@functools.cache
def _prototype(family: str) -> PreTrainedModel:
    torch.manual_seed(len(family))
    # Jamba says in a warning of its own that it runs without its CUDA kernels.
    logging.getLogger("transformers").setLevel(logging.ERROR)
    model = AutoModelForCausalLM.from_config(_CONFIGS[family](), experts_implementation="eager")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1 and "A_log" not in name and "conv1d" not in name:
                nn.init.normal_(parameter, std=0.25)
        for layer in find_moe_layers(model):
            for tensor in layer.expert_tensors().values():
                nn.init.normal_(tensor, std=0.3)
            for tensor in layer.router.parameters(recurse=True):
                nn.init.normal_(tensor, std=1.0)
            for tensor in layer.selection_biases():
                nn.init.normal_(tensor, std=0.4)
    return model.eval()


def token_ids(*shape: int, seed: int = 0) -> Tensor:
    """Random token ids without the special ones."""
    return torch.randint(3, VOCAB, shape, generator=torch.Generator().manual_seed(seed))


def rows(*sizes: tuple[int, int], seed: int = 0) -> list[TokenizedRow]:
    """One row per (prompt length, answer length); every other one is unsafe, the first one too."""
    return [
        TokenizedRow(
            token_ids(prompt, seed=seed * 100 + n).tolist(),
            token_ids(answer, seed=seed * 100 + 50 + n).tolist(),
            is_unsafe=n % 2 == 0,
        )
        for n, (prompt, answer) in enumerate(sizes)
    ]


def mask(model: nn.Module, *per_layer: Sequence[int]) -> Mask:
    """(L, E) mask that allows the given experts of each MoE layer."""
    moe_layers = find_moe_layers(model)
    mask_LE = np.zeros((len(moe_layers), moe_layers.num_experts), dtype=bool)
    for row, allowed in enumerate(per_layer):
        mask_LE[row, list(allowed)] = True
    return mask_LE


def batch_masks(model: nn.Module, per_batch: dict[int, Sequence[tuple[int, int]]]) -> ExpertMasks:
    """Masks from `(row of the MoE layer, expert)` pairs per `batch_idx`."""
    layers = find_moe_layers(model).layers
    selected = {batch: [Expert(layers[row], expert) for row, expert in pairs] for batch, pairs in per_batch.items()}
    return masks_from_experts(selected, layers=layers, num_experts=NUM_EXPERTS)


def hooks_left(model: nn.Module) -> int:
    """Hooks on any module, instance attributes that hide a parameter or buffer, and torch function modes in force."""
    kinds = (
        "_forward_hooks",
        "_forward_pre_hooks",
        "_backward_hooks",
        "_backward_pre_hooks",
        "_forward_hooks_always_called",
    )
    hooks = sum(len(getattr(module, kind)) for module in model.modules() for kind in kinds)
    hidden = sum(
        name in module.__dict__ for module in model.modules() for name in [*module._parameters, *module._buffers]
    )
    return hooks + hidden + torch._C._len_torch_function_stack()


def state_of(model: nn.Module) -> dict[str, Tensor]:
    """Copies of all parameters and buffers, also those that are not saved."""
    return {name: tensor.detach().clone() for name, tensor in [*model.named_parameters(), *model.named_buffers()]}


@contextmanager
def routing_spied(model: nn.Module) -> Iterator[list[tuple[Tensor, Tensor]]]:
    """Records (index, weights) of every call of every experts module by replacing `forward`: no hook is involved."""
    calls: list[tuple[Tensor, Tensor]] = []
    layers = find_moe_layers(model)
    for layer in layers:
        original = layer.experts.forward

        def spy(hidden: Tensor, index: Tensor, weights: Tensor, original: Any = original) -> Any:
            calls.append((index.detach().clone(), weights.detach().clone()))
            return original(hidden, index, weights)

        layer.experts.forward = spy
    try:
        yield calls
    finally:
        for layer in layers:
            del layer.experts.forward
