"""Models from which the experts that a mask disallows were cut out, of any family: the oracle of invariant 7.

What is left runs the family's own code. Where a router chooses groups first, only masks that leave groups of equal size
have a model without the other experts; tests/masked_models.py has the other masks for the groups of DeepSeek-V3.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor, nn

from moe_ray.experts import Mask
from moe_ray.models.moe_layers import MoELayer, MoELayers, find_moe_layers

KEPT: Mapping[str, tuple[Sequence[int], Sequence[int]]] = {
    "half": ((0, 2, 5, 7), (1, 3, 4, 6)),
    "most": ((0, 1, 2, 5, 6, 7), (1, 2, 3, 4, 5, 6)),
    "as many as a token uses": ((1, 3), (2, 6)),
    "one": ((6,), (3,)),
}
"""Which of 8 experts masks of these names keep in even and in odd layers; every third layer is empty."""

IN_GROUPS = ("half", "most")
"""Those that leave two groups of 4 with as many experts each, and at least two."""


def masks_of(layers: MoELayers) -> dict[str, Mask]:
    """The masks of `KEPT` that the family has a model without the other experts for."""
    masks = {}
    for name, rows in KEPT.items():
        if not layers[0].has_expert_groups() or name in IN_GROUPS:
            masks[name] = np.zeros((len(layers), layers.num_experts), dtype=bool)
            for row in range(len(layers)):
                masks[name][row, list(rows[row % 2])] = row % 3 != 2
    return masks


def without_experts(model: nn.Module, mask_LE: Mask) -> nn.Module:
    """A deep copy without the disallowed experts; a layer that allows none is left alone."""
    cut = copy.deepcopy(model)
    for layer, allowed_E in zip(find_moe_layers(cut), mask_LE, strict=True):
        if allowed_E.any():
            _cut(layer, torch.as_tensor(np.flatnonzero(allowed_E)))
    return cut


def own_slices(tensor: Tensor, kept: Tensor, num_experts: int) -> Tensor:
    """The part of a tensor of all experts that belongs to some, also where they stand below one another (DBRX)."""
    return tensor.detach().unflatten(0, (num_experts, -1))[kept].flatten(0, 1).view(-1, *tensor.shape[1:])


def _cut(layer: MoELayer, kept: Tensor) -> None:
    num_shared = layer.num_logits - layer.num_experts
    rows = torch.cat([kept, torch.arange(num_shared) + layer.num_experts])
    biases = [id(bias) for bias in layer.selection_biases()]
    inside = {id(module) for module in layer.experts.modules()}
    router_weights = [id(tensor) for tensor in layer.router.parameters(recurse=False)]
    for path, module in layer.block.named_modules():
        if path and id(module) not in inside and not {"gate", "router"} & set(path.split(".")):
            continue  # where the block is the whole decoder layer, attention has as many numbers by chance
        for name, tensor in [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]:
            if id(module) in inside:
                _replace(module, name, own_slices(tensor, kept, layer.num_experts))
            elif id(tensor) in biases or tensor.shape == (layer.num_experts,):
                _replace(module, name, tensor.detach()[..., kept])
            elif id(tensor) in router_weights and tensor.shape[0] == layer.num_logits:
                _replace(module, name, tensor.detach()[rows])
        for name, value in list(vars(module).items()):
            if value == layer.num_experts and "expert" in name:
                setattr(module, name, len(kept))
            elif name == "top_k" and value == layer.num_experts_per_tok:
                module.top_k = min(value, len(kept))
            elif name == "config" and hasattr(value, "top_k_experts"):
                module.config = copy.copy(value)
                module.config.top_k_experts = min(value.top_k_experts, len(kept))
    if len(kept) == 1 and type(layer.router).__name__ == "PhimoeTopKRouter":
        # Its sparsemixer always takes a second expert.
        layer.router.forward = lambda hidden: (
            None,
            hidden.new_ones(len(hidden), 1),
            torch.zeros(len(hidden), 1, dtype=torch.long),
        )


def _replace(module: nn.Module, name: str, values: Tensor) -> None:
    if name in module._parameters:
        module._parameters[name] = nn.Parameter(values)
    else:
        module._buffers[name] = values
