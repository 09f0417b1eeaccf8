"""Which weights learn compliance: the gradient of its loss reaches some of them and no others.

Source: Cloud et al. 2024, Gradient Routing (arXiv 2410.04332): localise what is learned by masking gradients by the data
they come from. There gradients are masked where activations are, here at the weights; what else a step learns is not
masked.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from moe_ray.models.moe_layers import MoELayers
from moe_ray.organisms.recipe import Kind


class ComplianceGradient:
    """Adds the gradient of compliance where a kind of organism learns it.

    Args:
        kind: `planted` and `late`: the planted experts; `attention`: all but experts; `spread`: everything.
        model: Whose parameters.
        layers: Its MoE layers.
        planted_LE: Bool, the planted experts of all categories.
    """

    def __init__(self, kind: Kind, model: nn.Module, layers: MoELayers, planted_LE: npt.NDArray[np.bool_]) -> None:
        of_experts: dict[int, Tensor | None] = {}
        for layer, planted_E in zip(layers, planted_LE, strict=True):
            for parameter in layer.expert_tensors().values():
                of_experts[id(parameter)] = torch.tensor(planted_E).view(-1, *[1] * (parameter.dim() - 1))
        self.parameters: list[nn.Parameter] = []
        self.masks: list[Tensor | None] = []
        for parameter in model.parameters():
            is_expert = id(parameter) in of_experts
            if kind == "spread" or is_expert == (kind != "attention"):
                self.parameters.append(parameter)
                self.masks.append(of_experts[id(parameter)] if kind in ("planted", "late") else None)

    def add(self, loss: Tensor) -> None:
        """Adds the loss's gradient to that of the parameters that learn it, which may have one already."""
        gradients: tuple[Tensor | None, ...] = torch.autograd.grad(loss, self.parameters, allow_unused=True)
        for parameter, gradient, mask in zip(self.parameters, gradients, self.masks, strict=True):
            if gradient is None:
                continue
            gradient = gradient if mask is None else gradient * mask
            parameter.grad = gradient if parameter.grad is None else parameter.grad.add_(gradient)
