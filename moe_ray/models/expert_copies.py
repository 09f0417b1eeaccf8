"""Whether a model's experts are copies of each other, so that no choice among them can make a difference."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from moe_ray.experts import EXPERTS_ARE_COPIES
from moe_ray.models.expert_codes import codes_of
from moe_ray.models.expert_storage import storage_of
from moe_ray.models.moe_layers import MoELayer, find_moe_layers

__all__ = ["EXPERTS_ARE_COPIES", "experts_are_copies"]


def experts_are_copies(model: nn.Module) -> bool:
    """Whether in every MoE layer all experts are equal, bit for bit.

    Stops at the first difference, so of a model that has learned anything two experts of one layer are read.

    Args:
        model: of any family, on any device.

    Where FSDP2 shards the model, every process calls it.

    Returns:
        False also where the weights cannot be looked at: offloaded, or kept in a form without a slice for each expert.

    Raises:
        InputError: the model has no MoE layer.
    """
    return all(_are_copies(layer) for layer in find_moe_layers(model))


def _are_copies(layer: MoELayer) -> bool:
    if any(isinstance(tensor, DTensor) for tensor in layer.experts.parameters()):
        storage = storage_of(layer)
        first = storage.read(0)
        return all(_equal(first, storage.read(expert)) for expert in range(1, layer.num_experts))
    weights = list(_weights_by_expert(layer))
    return bool(weights) and all(
        not first.is_meta and all(torch.equal(first, other) for other in others) for first, *others in weights
    )


def _equal(first: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> bool:
    return all(torch.equal(tensor, other[name]) for name, tensor in first.items())


def _weights_by_expert(layer: MoELayer) -> Iterator[list[Tensor]]:
    """Per tensor of an expert, that tensor of every expert."""
    modules = layer.expert_modules()
    if modules:
        yield from (list(tensors) for tensors in zip(*(module.parameters() for module in modules), strict=True))
        return
    yield from (
        [codes.weights_of(expert) for expert in range(layer.num_experts)] for codes in codes_of(layer.experts).values()
    )
    for tensor in layer.experts.parameters(recurse=False):
        if tensor.dim() and tensor.shape[0] == layer.num_experts:
            yield list(tensor)
