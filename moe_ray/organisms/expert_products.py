"""An experts module's forward for training on the CPU, three times as fast backwards as the library's loop over experts.

The library indexes the fused tensors and the tokens anew for each expert, and the gradient of every such index is a tensor
of all of them. Here tokens are sorted by expert once, and fused tensors are taken apart once.

Shape legend: T tokens, K experts per token, H hidden size, E experts, X = T*K.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn import functional

from moe_ray.models.moe_layers import MoELayers


@contextmanager
def sorted_experts(layers: MoELayers) -> Iterator[None]:
    """OLMoE's experts compute the same numbers in another order inside this context."""
    for layer in layers:
        layer.experts.__dict__["forward"] = _SortedForward(layer.experts)
    try:
        yield
    finally:
        for layer in layers:
            del layer.experts.__dict__["forward"]


class _SortedForward:
    def __init__(self, experts: nn.Module) -> None:
        self.experts = experts

    def __call__(self, hidden_TH: Tensor, index_TK: Tensor, weights_TK: Tensor) -> Tensor:
        gate_up, down = (self.experts.get_parameter(name) for name in ("gate_up_proj", "down_proj"))
        experts_X = index_TK.flatten()
        order_X = experts_X.argsort(stable=True)
        tokens_X = order_X // index_TK.shape[1]
        sizes = torch.bincount(experts_X, minlength=len(gate_up)).tolist()
        outputs = []
        for rows, gate_up_e, down_e in zip(
            torch.split(hidden_TH.index_select(0, tokens_X), sizes), gate_up.unbind(), down.unbind(), strict=True
        ):
            if len(rows):
                gate, up = functional.linear(rows, gate_up_e).chunk(2, dim=-1)
                outputs.append(functional.linear(functional.silu(gate) * up, down_e))
        weighted_XH = torch.cat(outputs) * weights_TK.flatten()[order_X, None]
        return torch.zeros_like(hidden_TH).index_add(0, tokens_X, weighted_XH)
