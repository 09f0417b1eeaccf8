"""Experts kept as codes, behind the seam of `expert_storage`: they are read dequantised, and written over their codes."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from moe_ray.models.expert_codes import codes_of
from moe_ray.models.moe_layers import MoELayer


class QuantisedStorage:
    """A layer whose fused matrices are codes; what is not quantised, such as biases, is written itself."""

    def __init__(self, layer: MoELayer) -> None:
        self._layer, self._codes = layer, codes_of(layer.experts)

    def dtypes(self) -> dict[str, torch.dtype]:
        """The number type of an expert's tensors, by name, as they are read."""
        return {name: tensor.dtype for name, tensor in self._layer.expert_stacks().items()}

    def read(self, expert: int) -> dict[str, Tensor]:
        """One expert's weights by name: those over its codes, else what the codes stand for."""
        return self._layer.tensors_of(expert)

    @torch.no_grad()
    def write(self, expert: int, tensors: Mapping[str, Tensor]) -> None:
        """Lays one expert's weights over its codes."""
        for name, codes in self._codes.items():
            codes.put(expert, tensors[name])
        for name, own in self._plain(expert).items():
            own.copy_(tensors[name])

    def restoration(self, expert: int) -> Callable[[], None]:
        """What puts an expert's weights back as they are now: over its codes what lay there, or nothing.

        To lay over them what they stand for would take the memory of weights.
        """
        over = {name: codes.learned.get(expert) for name, codes in self._codes.items()}
        copies = {name: own.detach().clone() for name, own in self._plain(expert).items()}

        @torch.no_grad()
        def restore() -> None:
            for name, weights in over.items():
                self._codes[name].put(expert, weights)
            for name, own in self._plain(expert).items():
                own.copy_(copies[name])

        return restore

    def _plain(self, expert: int) -> dict[str, Tensor]:
        stacks = self._layer.expert_stacks()
        return {name: tensor[expert] for name, tensor in stacks.items() if name not in self._codes}
