"""Gate attribution: how much a prompt's answer would lose, to first order, if an expert's output were turned down.

Every routing weight is multiplied by a gate, one for each row, layer and expert, and the loss of a row depends on the gates
of that row alone; so one backward through the activations gives all of them, with no gradient of any weight.

Shape suffixes: B rows, S positions, T = B*S tokens, K experts per token, L MoE layers, E experts.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from moe_ray.attribution.frozen_parameters import no_parameter_learns
from moe_ray.errors import InputError
from moe_ray.models.loss import answer_loss
from moe_ray.models.moe_layers import MoELayer, find_moe_layers, routing_of_call, uncompiled
from moe_ray.models.tokenization import TokenizedRow

GATES = 0.5
"""Where the derivative is taken: with all gates halved. Where an answer is all but certain its loss is flat at gates of 1,
and the derivative there is about nothing."""


def gate_attribution(
    model: PreTrainedModel, rows: Sequence[TokenizedRow], *, pad_id: int, gates: float = GATES
) -> npt.NDArray[np.float64]:
    """How much each row's answer leans on each expert's output.

    With `L` the mean loss of a row's answer tokens (nats per token) and `g` a factor on an expert's routing weight,
    `-dL/dg` where all factors are `gates`. Positive = the loss falls as the expert's output grows: it supports the answer.
    An expert that none of the row's tokens was routed to has 0. Padding has no part in it.

    Source: the first-order ("attribution patching") estimate of an ablation, Syed et al. 2023 and Molchanov et al. 2017,
    with experts as the nodes. Deviation: taken at halved gates.

    Args:
        model: a causal language model in eval mode; its weights, gradients and flags are as before afterwards.
        rows: B prompts with their answers.
        pad_id: token id that fills padding.
        gates: where the derivative is taken; 1 = the model as it is.

    Returns:
        (B, L, E) float64, in nats per token.

    Raises:
        InputError: the model has no experts, or belongs to a family that is not supported.
    """
    layers, precision = find_moe_layers(model), torch.promote_types(model.dtype, torch.float32)
    gates_LBE = [
        torch.full(
            (len(rows), layers.num_experts), gates, dtype=precision, device=next(layer.router.parameters()).device
        ).requires_grad_()
        for layer in layers
    ]
    answer_tokens_B = torch.tensor([len(row.answer_ids) for row in rows], dtype=torch.float32)
    with uncompiled(), _gated(layers, gates_LBE), no_parameter_learns(model), torch.enable_grad():
        losses_B = answer_loss(model, rows, pad_id=pad_id)
        total = (losses_B / answer_tokens_B.to(losses_B)).sum()
        gradients = torch.autograd.grad(total, gates_LBE, allow_unused=True)
    found = [torch.zeros_like(gate) if one is None else one for gate, one in zip(gates_LBE, gradients, strict=True)]
    return -np.stack([one.double().cpu().numpy() for one in found], axis=1)


@contextmanager
def _gated(layers: Sequence[MoELayer], gates_LBE: Sequence[Tensor]) -> Iterator[None]:
    """Every routing weight times the gate of its row and expert."""
    handles = []

    def make_hook(layer: MoELayer, gates_BE: Tensor) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
            hidden_TH, index_TK, weights_TK = routing_of_call(layer, args, kwargs)
            num_rows, num_tokens = len(gates_BE), len(index_TK)
            if num_tokens % num_rows:
                raise InputError(
                    f"{layer.name} received {num_tokens} tokens, expected as many for each of {num_rows} rows; this family "
                    "routes a part of the tokens only and is not supported"
                )
            rows_T1 = torch.arange(num_tokens, device=index_TK.device).unsqueeze(1) // (num_tokens // num_rows)
            gated_TK = (weights_TK * gates_BE.to(index_TK.device)[rows_T1, index_TK]).to(weights_TK.dtype)
            return (hidden_TH, index_TK, gated_TK, *[*args, *kwargs.values()][3:]), {}

        return hook

    try:
        for layer, gates_BE in zip(layers, gates_LBE, strict=True):
            handles.append(layer.experts.register_forward_pre_hook(make_hook(layer, gates_BE), with_kwargs=True))
        yield
    finally:
        for handle in handles:
            handle.remove()
