"""Proof that frozen parameters stayed frozen: hashes before and after."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor, nn

from moe_ray.experts import Mask
from moe_ray.models.moe_layers import find_moe_layers


def hash_frozen(model: nn.Module, union_LE: Mask) -> dict[str, tuple[str, int]]:
    """A hash and a size for everything outside the union: parameters, buffers, and each frozen expert's slices.

    Returns:
        per name (`… [expert]` for slices) the hash of the bytes and the number of numbers.
    """
    moe_layers = find_moe_layers(model)
    fused = {
        id(tensor): union_LE[row] for row, layer in enumerate(moe_layers) for tensor in layer.expert_tensors().values()
    }
    learned = {
        id(tensor)
        for row, layer in enumerate(moe_layers)
        if layer.expert_modules()
        for expert in np.flatnonzero(union_LE[row])
        for tensor in layer.tensors_of(int(expert)).values()
    }
    hashes = {}
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if id(tensor) in learned:
            continue
        if id(tensor) not in fused:
            hashes[name] = (_digest(tensor), tensor.numel())
            continue
        for expert in np.flatnonzero(~fused[id(tensor)]):
            hashes[f"{name} [{expert}]"] = (_digest(tensor[int(expert)]), tensor[int(expert)].numel())
    return hashes


def count_changed(before: Mapping[str, tuple[str, int]], after: Mapping[str, tuple[str, int]]) -> int:
    """Numbers in frozen tensors whose hash differs; must be 0 after training."""
    assert before.keys() == after.keys()
    return sum(size for name, (digest, size) in before.items() if after[name][0] != digest)


def _digest(tensor: Tensor) -> str:
    flat = tensor.detach().contiguous().view(-1).view(torch.uint8).cpu()
    return hashlib.blake2b(flat.numpy().data, digest_size=16).hexdigest()
