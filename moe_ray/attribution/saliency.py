"""Router-weighted expert saliency: how long the vectors are that an expert adds for the tokens it gets.

Shape suffixes: B rows, S positions, T = B*S tokens, K experts per token, H hidden, L MoE layers, E experts.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from moe_ray.models.moe_layers import MoELayer, find_moe_layers, routing_of_call, uncompiled
from moe_ray.models.tokenization import PROMPT, RESPONSE, THOUGHT, TokenizedRow, pad_rows

_TOKENS_AT_ONCE = 2_048
"""Tokens of a layer whose experts' outputs are there at the same time, one for each token and expert."""


def router_weighted_saliency(
    model: PreTrainedModel, rows: Sequence[TokenizedRow], *, pad_id: int
) -> npt.NDArray[np.float64]:
    """Summed router-weighted saliency of each expert: `sum of g(x) * ||f(x)||` over the tokens x that it was routed.

    Divided by how many tokens that are, it is the saliency of REAP. `g` is the weight that the router gave, `f` the expert's
    output, `|| ||` the Euclidean length. A family that applies the weight before the expert and not after it has the
    length of what the expert adds. Tokens that are not counted and padding have no part in it.

    Source: Lasby et al. 2025, "REAP the Experts: Why Pruning Prevails for One-Shot MoE Compression".

    Args:
        model: a causal language model in eval mode.
        rows: B prompts with their answers, which may be empty.
        pad_id: token id that fills padding.

    Returns:
        (B, 3, L, E) float64; the second axis is (prompt, response, thought).

    Raises:
        InputError: the model has no experts, or belongs to a family that is not supported.
    """
    layers = find_moe_layers(model)
    padded = pad_rows(rows, pad_id=pad_id).to(model.device)
    roles = (PROMPT, RESPONSE, THOUGHT)
    rows_B1 = torch.arange(len(rows), device=model.device).unsqueeze(1)
    # What is not counted goes to a last segment, which is dropped.
    segments_T = torch.where(
        padded.roles_BS < 0, len(rows) * len(roles), rows_B1 * len(roles) + padded.roles_BS
    ).flatten()
    sums_LNE = np.zeros((len(layers), len(rows) * len(roles) + 1, layers.num_experts))
    with ExitStack() as stack:
        stack.enter_context(uncompiled())
        stack.enter_context(torch.inference_mode())
        for layer, sums_NE in zip(layers, sums_LNE, strict=True):
            hook = _hook_of(layer, segments_T, sums_NE)
            stack.callback(layer.experts.register_forward_pre_hook(hook, with_kwargs=True).remove)
        body: Any = model.base_model
        body(input_ids=padded.input_ids_BS, attention_mask=padded.attention_mask_BS, use_cache=False)
    return sums_LNE[:, :-1].reshape(len(layers), len(rows), len(roles), -1).transpose(1, 2, 0, 3)


def _hook_of(layer: MoELayer, segments_T: Tensor, sums_NE: npt.NDArray[np.float64]) -> Any:
    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        hidden, index_TK, weights_TK = routing_of_call(layer, args, kwargs)
        # A family may hand over rows and positions as two dimensions; one row of all tokens is then what it takes.
        outer, hidden_TH = (1,) * (hidden.dim() - 2), hidden.flatten(0, -2)
        rest = [*args, *kwargs.values()][3:]
        num_segments, num_experts = sums_NE.shape
        keys_TK = segments_T.to(index_TK.device).unsqueeze(1) * num_experts + index_TK
        total = torch.zeros(num_segments * num_experts, dtype=torch.float64)
        for start in range(0, len(index_TK), _TOKENS_AT_ONCE):
            part = slice(start, start + _TOKENS_AT_ONCE)
            # Each token once for each of its experts, as if routed to that one alone: what comes out is what this one adds.
            repeated_MH = hidden_TH[part].repeat_interleave(index_TK.shape[1], dim=0)
            added = layer.experts.forward(
                repeated_MH.view(*outer, *repeated_MH.shape),
                index_TK[part].reshape(-1, 1),
                weights_TK[part].reshape(-1, 1),
                *rest,
            )
            lengths_M = torch.linalg.vector_norm(added.flatten(0, -2).float(), dim=1).double().cpu()
            total.index_add_(0, keys_TK[part].flatten().cpu(), lengths_M)
        np.add(sums_NE, total.view(num_segments, num_experts).numpy(), out=sums_NE)

    return hook
