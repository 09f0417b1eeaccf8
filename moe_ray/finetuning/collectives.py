"""Gradients and parameters between workers, in buckets: few calls, and no second copy of all that is sent.

Small tensors are put together until a bucket is full, so the number of calls goes with bytes and not with experts; what a
bucket adds to memory is its size, however much is sent in all.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn

BUCKET_BYTES = 64 * 2**20
"""What a bucket holds at most; a tensor that is larger goes alone, and is not copied."""


def in_buckets(tensors: Sequence[nn.Parameter], *, limit: int | None = None) -> Iterator[list[nn.Parameter]]:
    """Cuts parameters into groups of one device and type, in the order in which they come.

    Args:
        tensors: layers may be spread over devices; on every worker of the same sizes in the same order, as collectives pair
            tensors by position.
        limit: bytes of a group; a parameter that is larger is a group of its own; None = `BUCKET_BYTES`.
    """
    most = BUCKET_BYTES if limit is None else limit
    groups: dict[tuple[torch.device, torch.dtype], list[nn.Parameter]] = defaultdict(list)
    for tensor in tensors:
        groups[tensor.device, tensor.dtype].append(tensor)
    for group in groups.values():
        bucket: list[nn.Parameter] = []
        size = 0
        for tensor in group:
            if bucket and size + tensor.nbytes > most:
                yield bucket
                bucket, size = [], 0
            bucket.append(tensor)
            size += tensor.nbytes
        yield bucket


def gradient_or_zeros(parameter: nn.Parameter) -> Tensor:
    """The parameter's gradient; zeros where it got none."""
    return torch.zeros_like(parameter) if parameter.grad is None else parameter.grad


@torch.no_grad()
def sum_gradients(parameters: Sequence[nn.Parameter]) -> None:
    """Every worker's gradients of these parameters become the sum over workers; a collective."""
    _reduce(parameters, dist.all_reduce, keeps_sum=True)


@torch.no_grad()
def sum_gradients_at(owner: int, parameters: Sequence[nn.Parameter]) -> None:
    """The owner's gradients of these parameters become the sum over workers, and the others have none; a collective.

    Args:
        owner: rank of a worker.
        parameters: on every worker the same, in one order.
    """
    _reduce(parameters, lambda flat: dist.reduce(flat, dst=owner), keeps_sum=dist.get_rank() == owner)


@torch.no_grad()
def send_from(owner: int, parameters: Sequence[nn.Parameter]) -> None:
    """Every worker's parameters become the owner's, bit for bit; a collective.

    Args:
        owner: rank of a worker.
        parameters: on every worker the same, in one order.
    """
    is_owner = dist.get_rank() == owner
    for bucket in in_buckets(parameters):
        if len(bucket) == 1 and bucket[0].is_contiguous():
            dist.broadcast(bucket[0].detach(), src=owner)
            continue
        flat = bucket[0].new_empty(sum(parameter.numel() for parameter in bucket))
        if is_owner:
            torch.cat([parameter.detach().flatten() for parameter in bucket], out=flat)
        dist.broadcast(flat, src=owner)
        if not is_owner:
            for parameter, part in zip(bucket, _parts(flat, bucket), strict=True):
                parameter.copy_(part)


def _reduce(parameters: Sequence[nn.Parameter], collective: Callable[[Tensor], object], *, keeps_sum: bool) -> None:
    for bucket in in_buckets(parameters):
        # A worker whose batches do not hold an expert sends zeros: every worker must send as many numbers.
        gradients = [gradient_or_zeros(parameter) for parameter in bucket]
        flat = gradients[0].contiguous() if len(bucket) == 1 else torch.cat([one.flatten() for one in gradients])
        collective(flat)
        for parameter, part in zip(bucket, _parts(flat, bucket), strict=True):
            parameter.grad = part if keeps_sum else None


def _parts(flat: Tensor, bucket: Sequence[nn.Parameter]) -> list[Tensor]:
    parts = torch.split(flat.view(-1), [parameter.numel() for parameter in bucket])
    return [part.view_as(parameter) for part, parameter in zip(parts, bucket, strict=True)]
