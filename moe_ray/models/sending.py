"""Tensors of the host on their way to a device, without the host waiting until they are there."""

from __future__ import annotations

import torch
from torch import Tensor


def sent(tensor: Tensor, device: torch.device | str) -> Tensor:
    """The same tensor on a device.

    A copy from ordinary memory to a GPU is waited for, since that memory may move. From pinned memory the host goes on at
    once; what the GPU computes later waits for the copy, and PyTorch keeps the memory until it is done.

    Args:
        tensor: of any shape and type.
        device: where it goes; any but a CUDA one, or a tensor that is on no host, is an ordinary copy.
    """
    if torch.device(device).type != "cuda" or tensor.device.type != "cpu":
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)
