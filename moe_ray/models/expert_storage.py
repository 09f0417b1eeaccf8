"""Where an expert's weights live: the one seam through which training and adapters read and write them.

`storage_of` chooses a layer's backend by what its tensors are. A new backend is a class with the members of `ExpertStorage`,
in a module of its own, and a line in `storage_of`. What is about all of a model's tensors and not about experts, such as
hashing what must not change, goes through `local_part`, which also has to know a backend whose tensors are not whole here.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Protocol

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from moe_ray.models.expert_codes import codes_of
from moe_ray.models.moe_layers import MoELayer
from moe_ray.models.quantised_storage import QuantisedStorage
from moe_ray.models.sharded_storage import ShardedStorage, local_slice


class ExpertStorage(Protocol):
    """The experts of one MoE layer.

    What is written is what `read` gives and what the model computes with from then on. Where the weights are spread over
    processes, `read`, `write` and `restoration` are collectives: all of them call it, in one order.
    """

    def dtypes(self) -> dict[str, torch.dtype]:
        """The number type of an expert's tensors, by name, as `read` gives them; never a collective."""
        ...

    def read(self, expert: int) -> dict[str, Tensor]:
        """One expert's weights by name, plain and whole; a caller copies them, as they may share the model's memory.

        Raises:
            InputError: they are offloaded, or kept in a form that moe-ray does not know.
        """
        ...

    def write(self, expert: int, tensors: Mapping[str, Tensor]) -> None:
        """Puts one expert's weights in place, from float tensors of any type and in the layer's own; without a gradient."""
        ...

    def restoration(self, expert: int) -> Callable[[], None]:
        """What puts one expert's weights back as they are now, bit for bit."""
        ...


class PlainStorage:
    """Experts whose tensors are whole and in this process, on any device."""

    def __init__(self, layer: MoELayer) -> None:
        self._layer = layer

    def dtypes(self) -> dict[str, torch.dtype]:
        """The number type of an expert's tensors, by name."""
        return {name: tensor.dtype for name, tensor in self._layer.tensors_of(0).items()}

    def read(self, expert: int) -> dict[str, Tensor]:
        """One expert's weights by name; they share memory with the model's own."""
        return self._layer.tensors_of(expert)

    @torch.no_grad()
    def write(self, expert: int, tensors: Mapping[str, Tensor]) -> None:
        """Copies one expert's weights into the model's own."""
        for name, tensor in self._layer.tensors_of(expert).items():
            tensor.copy_(tensors[name])

    def restoration(self, expert: int) -> Callable[[], None]:
        """What puts one expert's weights back as they are now."""
        return partial(
            self.write, expert, {name: tensor.detach().clone() for name, tensor in self.read(expert).items()}
        )


def storage_of(layer: MoELayer) -> ExpertStorage:
    """The backend that suits how the layer keeps its experts."""
    if codes_of(layer.experts):
        return QuantisedStorage(layer)
    is_spread = any(isinstance(tensor, DTensor) for tensor in layer.experts.parameters())
    return ShardedStorage(layer) if is_spread else PlainStorage(layer)


def local_part(tensor: Tensor, expert: int | None = None) -> Tensor | None:
    """What this process holds of one of the model's tensors, or of an expert's slice of it; None = nothing of it."""
    if isinstance(tensor, DTensor):
        return tensor.to_local() if expert is None else local_slice(tensor, expert)
    return tensor if expert is None else tensor[expert]
