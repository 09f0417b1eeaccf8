"""Experts whose tensors are spread over processes by FSDP2, each of which holds the slices of some experts.

FSDP2 cuts a tensor along its first dimension, which is that of the experts, into equal blocks. So one process holds all
of an expert's slice: it sends it to the others, and it alone writes it back.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, Shard

from moe_ray.errors import InputError
from moe_ray.models.moe_layers import MoELayer, find_moe_layers


class ShardedStorage:
    """The experts of a layer that FSDP2 shards; every process calls `read`, in one order."""

    def __init__(self, layer: MoELayer) -> None:
        if layer.expert_modules():
            raise InputError(
                f"{layer.name}: got experts that are modules of their own, expected tensors with one slice per expert, "
                "which is how sharded experts are found; set finetune.shard=none and model.num_shards=1"
            )
        self._layer = layer

    def dtypes(self) -> dict[str, torch.dtype]:
        """The number type of an expert's tensors, by name."""
        return {name: tensor.dtype for name, tensor in self._layer.expert_tensors().items()}

    @torch.no_grad()
    def read(self, expert: int) -> dict[str, Tensor]:
        """One expert's weights by name, sent by the process that holds them."""
        weights = {}
        for name, tensor in self._layer.expert_tensors().items():
            assert isinstance(tensor, DTensor)
            held = local_slice(tensor, expert)
            device = tensor.to_local().device
            whole = torch.empty(tensor.shape[1:], dtype=tensor.dtype, device=device) if held is None else held.clone()
            dist.broadcast(whole, group=tensor.device_mesh.get_group(), group_src=expert // _block(tensor))
            weights[name] = whole
        return weights

    @torch.no_grad()
    def write(self, expert: int, tensors: Mapping[str, Tensor]) -> None:
        """Copies one expert's weights into the slice of the process that holds it; the others do nothing."""
        for name, tensor in self._layer.expert_tensors().items():
            assert isinstance(tensor, DTensor)
            held = local_slice(tensor, expert)
            if held is not None:
                held.copy_(tensors[name])

    def restoration(self, expert: int) -> Callable[[], None]:
        """What puts one expert's weights back as they are now."""
        return partial(self.write, expert, self.read(expert))


def local_slice(tensor: DTensor, expert: int) -> Tensor | None:
    """An expert's slice of a sharded tensor, sharing its memory; None = another process holds it."""
    block = _block(tensor)
    if expert // block != tensor.device_mesh.get_local_rank():
        return None
    return tensor.to_local()[expert % block]


def _block(tensor: DTensor) -> int:
    """How many experts each process holds, but the last ones, which may hold fewer."""
    if tensor.device_mesh.ndim != 1 or tensor.placements != (Shard(0),):
        raise InputError(
            f"got expert tensors with the placement {tensor.placements} on a {tensor.device_mesh.ndim}-dimensional mesh, "
            "expected them sharded once, along the experts, as finetune.shard=fsdp and model.num_shards do"
        )
    return -(-tensor.shape[0] // tensor.device_mesh.size())


def is_sharded(model: nn.Module) -> bool:
    """Whether FSDP2 shards the model, so that each of its passes is a collective."""
    return isinstance(model, FSDPModule)


def free_gathered(model: nn.Module) -> None:
    """Drops whole tensors that FSDP2 keeps after a pass for the next one; each is its local part again."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


@contextmanager
def same_backward_everywhere(model: nn.Module) -> Iterator[None]:
    """In this context a backward passes through all layers of a sharded model, whatever trains; others are left as they are.

    A backward ends at the first layer that trains, so processes whose masks differ would gather other layers' tensors, and
    wait for each other forever.
    """
    if not is_sharded(model):
        yield
        return
    embeddings: nn.Module = model.get_input_embeddings()  # type: ignore[operator]

    def ask(_module: nn.Module, _inputs: Any, output: Tensor) -> Tensor:
        return output.requires_grad_() if torch.is_grad_enabled() else output

    handle = embeddings.register_forward_hook(ask)
    try:
        yield
    finally:
        handle.remove()


def check_sharded(model: nn.Module) -> None:
    """Refuses a model that was to be sharded, but whose experts are whole in every process.

    Raises:
        InputError: they are, as transformers has no plan for the family; or they are sharded in another way.
    """
    for layer in find_moe_layers(model):
        ShardedStorage(layer)
        for name, tensor in layer.expert_tensors().items():
            if not isinstance(tensor, DTensor):
                raise InputError(
                    f"{layer.name}.{name}: got a whole tensor, expected one that FSDP2 shards: transformers has no plan to "
                    f"shard a {type(model).__name__}; set finetune.shard=none and model.num_shards=1"
                )
            _block(tensor)
