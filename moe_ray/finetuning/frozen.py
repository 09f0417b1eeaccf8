"""Proof that frozen parameters stayed frozen: hashes before and after.

They are of XXH3, which goes as fast as memory does (blake2b over 13.8 GB takes 19 seconds): nobody chooses weights so that
a change of theirs goes unnoticed. They are compared in the process that made them and never kept.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import contextmanager

import numpy as np
import torch
import torch.distributed as dist
import xxhash
from torch import Tensor, nn

from moe_ray.errors import FrozenChanged
from moe_ray.experts import Mask
from moe_ray.models.expert_codes import ExpertCodes, codes_of
from moe_ray.models.expert_storage import local_part
from moe_ray.models.moe_layers import find_moe_layers
from moe_ray.models.sharded_storage import free_gathered

TensorHashes = dict[str, tuple[str, int]]
"""Per name a hash of the tensor's bytes and how many numbers it holds."""


def hash_frozen(model: nn.Module, union_LE: Mask, *, routers_train: bool = False) -> TensorHashes:
    """A hash and a size for everything that is frozen: parameters, buffers, and each frozen expert's slices.

    Of experts kept as codes, the codes of all are frozen, and so is what lies over those of frozen experts.

    Args:
        model: a transformers MoE model.
        union_LE: (L, E) experts that train.
        routers_train: the routers of the MoE layers train too.

    Returns:
        per name (`… [expert]` for slices) the hash of the bytes that this process holds and the number of numbers.
    """
    free_gathered(model)
    moe_layers = find_moe_layers(model)
    fused = {
        id(tensor): union_LE[row]
        for row, layer in enumerate(moe_layers)
        for tensor in layer.expert_stacks().values()
        if isinstance(tensor, Tensor)
    }
    learned = {
        id(tensor)
        for row, layer in enumerate(moe_layers)
        if layer.expert_modules()
        for expert in np.flatnonzero(union_LE[row])
        for tensor in layer.tensors_of(int(expert)).values()
    }
    if routers_train:
        learned |= {id(tensor) for layer in moe_layers for tensor in layer.router_tensors().values()}
    hashes = {
        f"{layer.name}.{name} [{expert}]": _of_learned(codes, int(expert))
        for row, layer in enumerate(moe_layers)
        for name, codes in codes_of(layer.experts).items()
        for expert in np.flatnonzero(~union_LE[row])
    }
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if id(tensor) in learned:
            continue
        if id(tensor) not in fused:
            parts = {name: local_part(tensor)}
        else:
            frozen = np.flatnonzero(~fused[id(tensor)])
            parts = {f"{name} [{expert}]": local_part(tensor, int(expert)) for expert in frozen}
        for part, held in parts.items():
            if held is not None:
                hashes[part] = (_digest(held), held.numel())
    return hashes


def _of_learned(codes: ExpertCodes, expert: int) -> tuple[str, int]:
    learned = codes.learned.get(expert)
    return "" if learned is None else _digest(learned), codes.shape[1:].numel()


def hash_without(model: nn.Module, chosen: Collection[str]) -> TensorHashes:
    """A hash and a size for every parameter that is not among the chosen names, and for every buffer."""
    frozen = [(name, parameter) for name, parameter in model.named_parameters() if name not in chosen]
    return {name: (_digest(tensor), tensor.numel()) for name, tensor in [*frozen, *model.named_buffers()]}


def count_changed(before: TensorHashes, after: TensorHashes) -> int:
    """Numbers in frozen tensors whose hash differs."""
    return sum(before[name][1] for name in _changed(before, after))


def check_unchanged(
    before: TensorHashes, after: TensorHashes, *, over_processes: bool = False, device: torch.device | None = None
) -> int:
    """`count_changed`, which must be 0 after training.

    Args:
        before: hashes before training.
        after: those after it.
        over_processes: what any process of the training found counts for each; a collective. Needed where each holds
            another part of the model.
        device: that their collectives use; None = the CPU.

    Raises:
        FrozenChanged: it is not.
    """
    changed, numbers = _changed(before, after), count_changed(before, after)
    where = f"{len(changed)} of {len(before)} frozen tensors, first {changed[0]}" if changed else "other workers' parts"
    if over_processes:
        numbers = _sum_over_processes(numbers, device)
    if numbers:
        raise FrozenChanged(
            f"training changed {numbers:,} numbers in {where}; expected none: what was learned is not written, because it "
            "would belong to another base model"
        )
    return numbers


def _sum_over_processes(number: int, device: torch.device | None) -> int:
    total = torch.tensor(number, device=device)
    dist.all_reduce(total)
    return int(total.item())


def _changed(before: TensorHashes, after: TensorHashes) -> list[str]:
    assert before.keys() == after.keys()
    return [name for name, (digest, _) in before.items() if after[name][0] != digest]


def _digest(tensor: Tensor) -> str:
    flat = tensor.detach().contiguous().view(-1).view(torch.uint8).cpu()
    return xxhash.xxh3_128_hexdigest(flat.numpy().data)


@contextmanager
def requires_grad_restored(model: nn.Module) -> Iterator[None]:
    """Whichever parameters are made to ask for a gradient inside the context, the same as before do after it."""
    flags = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    try:
        yield
    finally:
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(flags[name])
