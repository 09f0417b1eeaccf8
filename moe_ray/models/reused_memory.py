"""Memory on the CPU that tensors of a short life take in turns.

The allocator of the C library gives the system back what is free at the end of its heap alone. Where large tensors come and
go between small ones that stay, as dequantised weights do between the activations of a forward pass, each leaves a hole that
the next small ones settle in: int8 experts took 2.2 GB, and 10 after two passes of training. To map every large tensor by
itself instead (`MALLOC_MMAP_THRESHOLD_`) makes a pass several times slower, since each page is then given out anew.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from threading import Lock

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

_MMAP_THRESHOLD, _APART_FROM, _USUAL = -3, 1 << 20, 32 << 20
"""A parameter of glibc's `mallopt`, see its manual, and its values in bytes: here, and the largest it takes by itself."""

_MOST_KEPT = 4
"""Blocks of a size that are kept: a forward pass has the weights of one or two of an expert's matrices at a time."""


class ReusedMemory:
    """Blocks that are handed out again when nothing uses what was made of them: no tensor, no view and no graph."""

    def __init__(self) -> None:
        self._blocks: dict[int, list[tuple[Tensor, StorageWeakRef]]] = {}
        self._lock = Lock()

    def empty(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """A tensor on the CPU with any content, in a free block; in memory of its own where too many blocks are in use."""
        size = torch.Size(shape).numel() * dtype.itemsize
        with self._lock:
            blocks = self._blocks.setdefault(size, [])
            free = (place for place, (_, last) in enumerate(blocks) if last.expired())  # type: ignore[no-untyped-call]
            place = next(free, len(blocks))
            if place >= _MOST_KEPT or not size:
                return torch.empty(shape, dtype=dtype, device="cpu")
            block = blocks[place][0] if place < len(blocks) else torch.empty(size, dtype=torch.uint8, device="cpu")
            # Through numpy the tensor gets a storage of its own, whose end says that the block is free.
            bytes_of_block = torch.from_numpy(block.numpy())
            blocks[place : place + 1] = [(block, StorageWeakRef(bytes_of_block.untyped_storage()))]  # type: ignore[no-untyped-call]
        return bytes_of_block.view(dtype).view(*shape)


@contextmanager
def mapped_apart() -> Iterator[None]:
    """In this context what a library allocates of a megabyte or more goes back to the system when it is freed.

    For tensors that cannot be made in given memory. It changes the whole process, so it should be short; nothing happens
    where the C library is not glibc.
    """
    mallopt = _mallopt()
    if mallopt is None:
        yield
        return
    mallopt(_MMAP_THRESHOLD, _APART_FROM)
    try:
        yield
    finally:
        mallopt(_MMAP_THRESHOLD, _USUAL)


@cache
def _mallopt() -> Callable[[int, int], int] | None:
    try:
        found: Callable[[int, int], int] = ctypes.CDLL("libc.so.6").mallopt
    except (OSError, AttributeError):
        return None
    return found
