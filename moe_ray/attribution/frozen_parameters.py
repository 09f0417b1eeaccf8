"""A model none of whose parameters asks for a gradient, while gradients of something else are taken."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn


@contextmanager
def no_parameter_learns(model: nn.Module) -> Iterator[None]:
    """No parameter asks for a gradient meanwhile, so that none is computed; afterwards those ask that did before."""
    learning = [parameter for parameter in model.parameters() if parameter.requires_grad]
    try:
        for parameter in learning:
            parameter.requires_grad_(False)
        yield
    finally:
        for parameter in learning:
            parameter.requires_grad_(True)
